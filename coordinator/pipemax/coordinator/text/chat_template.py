"""Chat templates: a model folder's Jinja template rendered as transformers renders it.

Templates come with model folders and are code of unknown origin. They run in Jinja's sandbox, see
plain data only, and stop when they have written more than they may.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, Final

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pipemax.proto.errors import ModelError, RequestError
from pipemax.proto.messages.ingest import ChatOptions

MAX_MESSAGES = 4096
"""Most messages of one chat: templates may loop over them more than once."""


_PLAIN: Final = ChatOptions()
_OWN_VARIABLES: Final = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"}
    | {"chat_template", "tokenize", "raise_exception", "strftime_now"}
)
_MARK: Final = "\ue0f1continue here\ue0f2 "
"""Put behind a message that is to be continued, and found again in what the template wrote.
Characters for private use: no prompt is likely to hold them."""


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks what the assistant wrote, for training. For
    inference it is its body."""

    tags = {"generation"}  # noqa: RUF012  (how Jinja declares it)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """One compiled chat template.

    Arguments:
        source: the template's text.
        variables: what every rendering sees beside the messages: `bos_token`, `eos_token`, …
        origin: where the text came from, for messages.

    Raises ModelError when the template does not compile.
    """

    def __init__(self, source: str, variables: Mapping[str, str], origin: str) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationTag, jinja2.ext.loopcontrols],
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ModelError(
                f"{origin}: chat template, line {error.lineno}: {error.message}; "
                "correct the template or remove it to serve plain prompts only"
            ) from error
        self._variables = dict(variables)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        max_chars: int,
        options: ChatOptions = _PLAIN,
    ) -> str:
        """The prompt for `messages`, ending where the assistant's turn begins, unless `options` say
        otherwise.

        Raises RequestError with code `template` when the template refuses the messages or fails,
        or the options contradict each other, and `too_long` when it writes more than `max_chars`
        characters.
        """
        _check(options)
        if not messages:
            raise RequestError("empty_prompt", "messages is empty; give at least one message")
        if len(messages) > MAX_MESSAGES:
            raise RequestError(
                "too_long", f"{len(messages)} messages; a chat may have at most {MAX_MESSAGES}"
            )
        if options.continue_final_message:
            marked = [*messages[:-1], _marked(messages[-1])]
            text = self._write(marked, max_chars + len(_MARK), options)
            return _up_to_mark(text, str(messages[-1]["content"]))
        return self._write(messages, max_chars, options)

    def _write(
        self, messages: Sequence[Mapping[str, Any]], max_chars: int, options: ChatOptions
    ) -> str:
        pieces: list[str] = []
        length = 0
        try:
            for piece in self._template.generate(
                # As transformers does: a field that is null is a field that is absent.
                messages=[{k: v for k, v in m.items() if v is not None} for m in messages],
                tools=None,
                documents=None,
                add_generation_prompt=options.add_generation_prompt,
                **{**self._variables, **(options.chat_template_kwargs or {})},
            ):
                pieces.append(piece)
                length += len(piece)
                if length > max_chars:
                    break
        except Exception as error:  # a template may fail in any way Python can
            reason = " ".join(str(error).split()) or type(error).__name__
            raise RequestError("template", f"chat template: {reason:.500}") from error
        if length > max_chars:
            raise RequestError(
                "too_long", f"the chat template wrote more than the {max_chars} characters allowed"
            )
        return "".join(pieces)


def _check(options: ChatOptions) -> None:
    if options.continue_final_message and options.add_generation_prompt:
        raise RequestError(
            "template",
            "continue_final_message and add_generation_prompt, which is on by default, exclude "
            "each other; set one of them to false",
        )
    for name in options.chat_template_kwargs or ():
        if name in _OWN_VARIABLES or not name.isidentifier():
            raise RequestError("template", f"chat_template_kwargs: {name!r:.80} cannot be set")


def _marked(message: Mapping[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    if not isinstance(content, str):
        raise RequestError("template", "continue_final_message: the last message has no text")
    return {**message, "content": content + _MARK}


def _up_to_mark(text: str, content: str) -> str:
    """As transformers does: a template that trims the text also trims the mark's last space, and
    the text then ends without space."""
    at = text.rfind(_MARK.rstrip())
    if at < 0 or content.strip() not in text:
        raise RequestError(
            "template",
            "continue_final_message: the chat template does not write the last message as it is",
        )
    return text[:at] if text.startswith(_MARK, at) else text[:at].rstrip()


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML, which prompts are not."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def find_chat_template(
    read_text: Callable[[str], str | None], tokenizer_config: Mapping[str, Any]
) -> tuple[str, str] | None:
    """The template's text and the file it stands in: `chat_template.jinja`, else the key
    `chat_template` of tokenizer_config.json, which is one template or a list of named ones, of
    which `default` is taken. None when there is none; raises ModelError for any other shape."""
    source = read_text("chat_template.jinja")
    if source is not None:
        return source, "chat_template.jinja"
    found = tokenizer_config.get("chat_template")
    if found is None:
        return None
    if isinstance(found, str):
        return found, "tokenizer_config.json"
    if isinstance(found, list):
        named = {
            entry["name"]: entry["template"]
            for entry in found
            if isinstance(entry, dict) and {"name", "template"} <= entry.keys()
        }
        default = named.get("default")
        if isinstance(default, str):
            return default, "tokenizer_config.json"
        names = ", ".join(map(str, named)) or "none"
        raise ModelError(
            f"tokenizer_config.json: chat_template lists {names} but no template named 'default'; "
            "write the one to use to chat_template.jinja"
        )
    raise ModelError(
        "tokenizer_config.json: chat_template is neither a string nor a list of named templates"
    )
