"""OpenAI's request bodies: JSON to a request. Lines of batch files and `pipemax serve` bring them.

Field names and meanings are OpenAI's and vLLM's. Nothing is accepted and ignored: a field must be
known, and one that is known and not implemented may only hold the value that asks for nothing.
"""

import re
from typing import Any, TypeVar

import msgspec

from pipemax.client import SamplingParams, Submit
from pipemax.proto.errors import RequestError
from pipemax.proto.messages.ingest import ChatOptions
from pipemax.services.batch.openai_results import CHAT_URL, COMPLETIONS_URL, ResultForm

Fields = TypeVar("Fields", SamplingParams, ChatOptions)
PROMPT_FIELDS = {CHAT_URL: "messages", COMPLETIONS_URL: "prompt"}
"""The endpoints, and the field of each that holds the prompt."""
MAX_TOP_LOGPROBS = 20

_SAMPLING_FIELDS = frozenset(SamplingParams.__struct_fields__)
_STRUCTURED: dict[str, str | None] = {
    "structured_outputs": None,
    "response_format": None,
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
}
"""Fields that say what the output must be; the last ones are vLLM's older names for a part of the
first."""
_OWN_FIELDS: dict[str, tuple[str, ...]] = {
    CHAT_URL: (*_STRUCTURED, "best_of", "logprobs", "top_logprobs", *ChatOptions.__struct_fields__),
    COMPLETIONS_URL: (*_STRUCTURED, "best_of", "echo"),
}
"""Fields of one endpoint that do not stand for a sampling parameter as they are."""
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "stream": (False,),
    "stream_options": (),
    "user": (),
    "metadata": ({},),
    "store": (False,),
    "service_tier": ("auto", "default"),
}
"""Fields of both endpoints that are not implemented, and the values, beside null, that are
accepted because they ask for nothing."""
_NEUTRAL_CHAT: dict[str, tuple[Any, ...]] = {
    "echo": (False,),
    "tools": ([],),
    "tool_choice": ("none",),
    "parallel_tool_calls": (True,),
    "functions": ([],),
    "function_call": ("none",),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "web_search_options": (),
    "chat_template": (),
}
_NEUTRAL_COMPLETIONS: dict[str, tuple[Any, ...]] = {
    "suffix": ("",),
}
MESSAGE_NEUTRAL: tuple[str, ...] = (
    "name",
    "tool_calls",
    "tool_call_id",
    "function_call",
    "audio",
    "refusal",
)
"""Fields of a message that may only be null."""
_VALIDATION_PATH = re.compile(r"(.*) - at `\$\.(\w+)[^`]*`", re.DOTALL)


def fields_of(url: str) -> tuple[tuple[str, ...], dict[str, tuple[Any, ...]]]:
    """For who describes the bodies of an endpoint: the fields that stand for sampling parameters as
    they are; and those that are not implemented, with what they may hold beside null."""
    own = _OWN_FIELDS[url]
    plain = tuple(name for name in SamplingParams.__struct_fields__ if name not in own)
    if url == CHAT_URL:
        return (*plain, "max_completion_tokens"), _NEUTRAL | _NEUTRAL_CHAT
    return plain, _NEUTRAL | _NEUTRAL_COMPLETIONS


class LineError(RequestError):
    """A line that gives an error line: `status` as HTTP would have it, and whose line it was, if
    that could be read."""

    def __init__(self, code: str, message: str, *, status: int = 400) -> None:
        super().__init__(code, message)
        self.status = status
        self.custom_id: str | None = None


def parse_body(
    body: dict[str, Any], url: str, model_name: str, request_id: str
) -> tuple[Submit, ResultForm]:
    """The request in a body for `url`, and the form of its result. Raises LineError."""
    _check_model(body.get("model"), model_name)
    submit = _parse_body(body, url, request_id)
    form = ResultForm(
        url=url,
        token_ids=submit.prompt_token_ids is not None,
        logprobs=submit.sampling.logprobs,
        prompt_logprobs=body.get("prompt_logprobs") is not None,
        echo=submit.echo,
        output=not (submit.echo and body.get("max_tokens") == 0),
    )
    return submit, form


def _parse_body(body: dict[str, Any], url: str, request_id: str) -> Submit:
    is_chat = url == CHAT_URL
    sampling: dict[str, Any] = {"max_tokens": None if is_chat else 16}
    neutral = _NEUTRAL | (_NEUTRAL_CHAT if is_chat else _NEUTRAL_COMPLETIONS)
    for name, value in body.items():
        if name in ("model", PROMPT_FIELDS[url], *_OWN_FIELDS[url]):
            continue
        if name in _SAMPLING_FIELDS or (is_chat and name == "max_completion_tokens"):
            if value is not None:
                sampling[name] = _integral(value)
        elif name in neutral:
            _check_neutral(name, value, neutral[name])
        else:
            raise LineError("unknown_field", f"unknown field {name!r:.80}")
    _check_best_of(body)
    _structured(body, sampling)
    if is_chat:
        _chat_logprobs(body, sampling)
        return Submit(
            request_id=request_id,
            messages=_messages(body.get("messages")),
            chat=_chat_options(body),
            sampling=_sampling(sampling),
        )
    echo = _echo(body, sampling)
    return _completion_submit(_integral(body.get("prompt")), request_id, _sampling(sampling), echo)


def _integral(value: Any) -> Any:
    """As JSON has it, 1.0 is 1: also in lists."""
    if type(value) is float and value.is_integer():
        return int(value)
    if type(value) is list and any(type(item) in (float, list) for item in value):
        return [_integral(item) for item in value]
    return value


def _check_best_of(body: dict[str, Any]) -> None:
    best_of, n = body.get("best_of"), body.get("n")
    if best_of is not None and (type(best_of) is not int or best_of != (1 if n is None else n)):
        raise LineError(
            "not_implemented",
            f"not implemented: 'best_of' {best_of!r:.40} with n {n!r:.40}; all are returned",
        )


def _structured(body: dict[str, Any], sampling: dict[str, Any]) -> None:
    given = [name for name in _STRUCTURED if body.get(name) is not None]
    if body.get("response_format") == {"type": "text"}:
        given.remove("response_format")
    if len(given) > 1:
        raise LineError("invalid_field", f"{' and '.join(given)} exclude each other; give one")
    sampling.pop("structured_outputs", None)
    for name in given:
        value, part = body[name], _STRUCTURED[name]
        if name == "response_format":
            value = _response_format(value)
        sampling["structured_outputs"] = value if part is None else {part: value}


def _response_format(form: object) -> dict[str, Any]:
    """As structured outputs."""
    kind = form.get("type") if isinstance(form, dict) else None
    if kind == "json_object" and form == {"type": kind}:
        return {"json_object": True}
    if isinstance(form, dict) and kind == "json_schema" and form.keys() == {"type", "json_schema"}:
        named = form["json_schema"]
        known = {"name", "description", "strict", "schema"}
        is_known = isinstance(named, dict) and named.keys() <= known
        if is_known and isinstance(named.get("schema"), dict):
            return {"json": named["schema"]}
    raise LineError(
        "invalid_field",
        "response_format must be of type text, json_object, or json_schema with a name and a "
        f"schema, not {form!r:.80}",
    )


def _chat_logprobs(body: dict[str, Any], sampling: dict[str, Any]) -> None:
    wanted, num_top = body.get("logprobs"), _integral(body.get("top_logprobs"))
    if not isinstance(wanted, bool | None):
        raise LineError("invalid_field", f"logprobs must be true or false, not {wanted!r:.80}")
    if num_top is not None and (type(num_top) is not int or not 0 <= num_top <= MAX_TOP_LOGPROBS):
        raise LineError(
            "invalid_field", f"top_logprobs must be 0 to {MAX_TOP_LOGPROBS}, not {num_top!r:.80}"
        )
    if num_top and not wanted:
        raise LineError("invalid_field", "top_logprobs needs logprobs to be true")
    if wanted:
        sampling["logprobs"] = num_top or 0


def _chat_options(body: dict[str, Any]) -> ChatOptions:
    given = {name: body[name] for name in ChatOptions.__struct_fields__ if name in body}
    return _convert({name: v for name, v in given.items() if v is not None}, ChatOptions)


def _echo(body: dict[str, Any], sampling: dict[str, Any]) -> bool:
    """Whether the result begins with the prompt. Its logprobs then do, too."""
    echo = body.get("echo")
    if not isinstance(echo, bool | None):
        raise LineError("invalid_field", f"echo must be true or false, not {echo!r:.80}")
    if echo:
        sampling.setdefault("prompt_logprobs", sampling.get("logprobs"))
        if sampling["max_tokens"] == 0 and type(sampling["max_tokens"]) is int:
            sampling["max_tokens"] = 1  # the prompt alone: what is produced is left out
    return bool(echo)


def _check_model(model: object, model_name: str) -> None:
    if not isinstance(model, str):
        raise LineError("invalid_field", f"model must be given; this system serves {model_name!r}")
    if model != model_name:
        raise LineError(
            "model_not_found",
            f"model {model!r:.200} is not served; this system serves {model_name!r} "
            "(--served-model-name gives it another name)",
            status=404,
        )


def _check_neutral(name: str, value: object, accepted: tuple[Any, ...]) -> None:
    if value is None or any(value == a and type(value) is type(a) for a in accepted):
        return
    raise LineError("not_implemented", f"not implemented: {name!r}")


def _sampling(fields: dict[str, Any]) -> SamplingParams:
    if "max_completion_tokens" in fields:
        newer = fields.pop("max_completion_tokens")
        if fields["max_tokens"] not in (None, newer):
            raise LineError(
                "invalid_field",
                f"max_tokens {fields['max_tokens']!r:.40} and max_completion_tokens "
                f"{newer!r:.40} differ; give one of them",
            )
        fields["max_tokens"] = newer
    if isinstance(fields.get("stop"), str):
        fields["stop"] = [fields["stop"]]
    return _convert(fields, SamplingParams)


def _convert(fields: dict[str, Any], into: type[Fields]) -> Fields:
    """Raises LineError that names the field."""
    try:
        return msgspec.convert(fields, into, str_keys=True)  # of logit_bias
    except msgspec.ValidationError as error:
        match = _VALIDATION_PATH.fullmatch(str(error))
        if match is None:
            raise LineError("invalid_field", str(error)) from error
        reason, name = match.groups()
        raise LineError("invalid_field", f"{name}: {reason}, not {fields[name]!r:.80}") from error


def _completion_submit(
    prompt: object, request_id: str, params: SamplingParams, echo: bool
) -> Submit:
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        if len(prompt) > 1:
            raise LineError(
                "not_implemented",
                f"not implemented: {len(prompt)} prompts in one request; make a request of each",
            )
        prompt = prompt[0]
    if isinstance(prompt, str):
        return Submit(request_id=request_id, prompt=prompt, sampling=params, echo=echo)
    if not isinstance(prompt, list) or not all(type(item) is int for item in prompt):
        raise LineError("invalid_field", "prompt must be a string or a list of token ids")
    ids = tuple(prompt)
    return Submit(request_id=request_id, prompt_token_ids=ids, sampling=params, echo=echo)


def _messages(messages: object) -> tuple[dict[str, Any], ...]:
    if not isinstance(messages, list) or not messages:
        raise LineError("invalid_field", "messages must be a list of at least one message")
    return tuple(_message(index, message) for index, message in enumerate(messages))


def _message(index: int, message: object) -> dict[str, Any]:
    where = f"messages[{index}]"
    if not isinstance(message, dict):
        raise LineError("invalid_field", f"{where} must be an object with role and content")
    for name, value in message.items():
        if name in MESSAGE_NEUTRAL:
            _check_neutral(f"{where}.{name}", value, ())
        elif name not in ("role", "content"):
            raise LineError("unknown_field", f"unknown field '{where}.{name:.80}'")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise LineError("invalid_field", f"{where}.role must be a string")
    if isinstance(content, list):
        content = "\n".join(_text_part(f"{where}.content", part) for part in content)
    if not isinstance(content, str):
        raise LineError("invalid_field", f"{where}.content must be a string or a list of texts")
    return {"role": role, "content": content}


def _text_part(where: str, part: object) -> str:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise LineError("invalid_field", f"{where}: a part is an object with a type")
    if part["type"] != "text":
        raise LineError("not_implemented", f"not implemented: {where} of type {part['type']!r:.40}")
    if not isinstance(part.get("text"), str) or len(part) != 2:
        raise LineError("invalid_field", f"{where}: a text part has the keys type and text")
    text: str = part["text"]
    return text
