"""The model folder's text side: its tokenizer, chat template, vocabulary and end-of-sequence ids.

Reads tokenizer.json with the `tokenizers` library alone. Ids and text are those of transformers'
fast tokenizers for the same folder; tests compare them.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders

from pipemax.coordinator.text.chat_template import ChatTemplate, find_chat_template
from pipemax.coordinator.text.limits import check_prompt_length
from pipemax.proto.errors import ModelError, RequestError
from pipemax.proto.messages.ingest import ChatOptions, Submit

_LOOSE_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_NORMALIZER_SLACK = 4
"""A normalizer may join characters (é from e and an accent): a prompt's text may be this much
longer than the longest its tokens could spell."""


class TextProcessor:
    """Prompts to token ids and token ids to text, for one model folder.

    Attributes:
        vocab_size: token ids the model has, from config.json.
        eos_token_ids: tokens that end a sequence, from generation_config.json, else config.json.
        has_tokenizer: whether text can be read and written; without, token ids only.

    Raises ModelError when a file is missing, unreadable or contradicts itself.
    """

    def __init__(self, model_dir: Path) -> None:
        self._dir = model_dir
        config = self._read_json("config.json")
        if config is None:
            raise ModelError(f"{model_dir} has no config.json; give the folder of a model")
        text_config = config.get("text_config")
        if isinstance(text_config, dict):
            config = {**config, **text_config}
        vocab_size = config.get("vocab_size")
        if not isinstance(vocab_size, int) or isinstance(vocab_size, bool) or vocab_size < 1:
            raise ModelError(f"{model_dir / 'config.json'}: vocab_size is {vocab_size!r}")
        self.vocab_size: int = vocab_size
        self.eos_token_ids = self._find_eos(config)

        settings = self._read_json("tokenizer_config.json") or {}
        special = _special_tokens(settings, self._read_json("special_tokens_map.json") or {})
        self._tokenizer: Tokenizer | None = self._load_tokenizer(special)
        self.has_tokenizer = self._tokenizer is not None
        self._token_texts: dict[int, str] = {}
        """Of single tokens, as far as they were asked for: no more than the vocabulary has."""
        self._special_ids: frozenset[int] = frozenset()
        self._loose_byte_ids: frozenset[int] = frozenset()
        self._longest_token_chars = self._slack = 1
        if self._tokenizer is not None:
            self._index_vocabulary(self._tokenizer)
        template = find_chat_template(self._read_text, settings)
        self._template = (
            ChatTemplate(template[0], special, str(model_dir / template[1])) if template else None
        )

    def encode(self, submit: Submit, max_model_len: int) -> tuple[int, ...]:
        """The request's prompt as token ids, each below `vocab_size`, with room for one output
        token within `max_model_len`.

        Plain text gets the special tokens the tokenizer adds of itself (often a
        begin-of-sequence); a chat gets those its template writes.

        Raises RequestError with code `prompt` (none or several given), `empty_prompt`,
        `too_long`, `vocabulary`, `no_tokenizer`, `no_chat_template` or `template`.
        """
        given = [
            name
            for name in ("prompt_token_ids", "prompt", "messages")
            if getattr(submit, name) is not None
        ]
        if len(given) != 1:
            raise RequestError(
                "prompt",
                "give exactly one of prompt_token_ids, prompt and messages, not "
                f"{' and '.join(given) or 'none'}",
            )
        if submit.messages is None and submit.chat != ChatOptions():
            raise RequestError("prompt", "chat: options of chats go with messages only")
        token_ids: Sequence[int]
        if submit.prompt_token_ids is not None:
            token_ids = submit.prompt_token_ids
        elif submit.prompt is not None:
            token_ids = self._encode_text(submit.prompt, max_model_len, add_special_tokens=True)
        else:
            token_ids = self._encode_chat(submit.messages or (), submit.chat, max_model_len)
        check_prompt_length(len(token_ids), max_model_len)
        highest = max(token_ids)
        if highest >= self.vocab_size or min(token_ids) < 0:
            wrong = highest if highest >= self.vocab_size else min(token_ids)
            raise RequestError(
                "vocabulary",
                f"prompt token id {wrong} is not in the vocabulary (0 to {self.vocab_size - 1})",
            )
        return tuple(token_ids)

    def encode_bad_words(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Token ids of `words` as vLLM takes them: each at the begin of a text, and behind a space
        where that gives another first token and no more of them. What the model has no token for
        it cannot write. Needs a tokenizer. Raises RequestError with code `bad_words` for a word
        that has no tokens."""
        found: list[tuple[int, ...]] = []
        for word in words:
            bare, spaced = self._tokens_of(word.lstrip()), self._tokens_of(" " + word.lstrip())
            if not bare:
                raise RequestError("bad_words", f"bad_words: {word!r:.80} has no tokens")
            found.append(bare)
            if len(spaced) == len(bare) and spaced[0] != bare[0]:
                found.append(spaced)
        return tuple(ids for ids in found if max(ids) < self.vocab_size)

    def _tokens_of(self, word: str) -> tuple[int, ...]:
        assert self._tokenizer is not None
        try:
            return tuple(self._tokenizer.encode(word, add_special_tokens=False).ids)
        except Exception as error:  # see _encode_text
            raise RequestError("bad_words", f"bad_words: {word!r:.80}: {error!s:.300}") from error

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        """Text of `token_ids`; empty without a tokenizer. Ids the tokenizer does not have (a
        model's vocabulary may be padded) read as nothing."""
        if self._tokenizer is None:
            return ""
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def token_text(self, token_id: int) -> str:
        """What the token reads as alone; `token_id:5` without a tokenizer."""
        if self._tokenizer is None:
            return f"token_id:{token_id}"
        found = self._token_texts.get(token_id)
        if found is None:
            found = self._token_texts[token_id] = self.decode((token_id,), False)
        return found

    def prompt_text(self, submit: Submit, prompt: Sequence[int]) -> str:
        """The text of a prompt whose token ids are `prompt`."""
        return submit.prompt if submit.prompt is not None else self.decode(prompt, False)

    def is_special(self, token_id: int) -> bool:
        """Whether `skip_special_tokens` leaves the token out."""
        return token_id in self._special_ids

    def is_loose_byte(self, token_id: int) -> bool:
        """Whether the token is a byte-fallback token, whose reading depends on its neighbours."""
        return token_id in self._loose_byte_ids

    def _encode_text(
        self, text: str, max_model_len: int, *, add_special_tokens: bool
    ) -> Sequence[int]:
        if self._tokenizer is None:
            raise RequestError(
                "no_tokenizer",
                f"{self._dir} has no tokenizer.json; send prompt_token_ids instead of text",
            )
        if not text:
            raise RequestError("empty_prompt", "the prompt is empty; give at least one character")
        # Checked before tokenising, which takes long for text that could never fit.
        self._check_chars(len(text), max_model_len)
        try:
            encoding = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        except Exception as error:  # e.g. a character outside a vocabulary without unknown token
            raise RequestError(
                "prompt", f"the tokenizer cannot encode it: {error!s:.300}"
            ) from error
        token_ids: Sequence[int] = encoding.ids
        return token_ids

    def _encode_chat(
        self, messages: Sequence[Mapping[str, Any]], options: ChatOptions, max_model_len: int
    ) -> Sequence[int]:
        if self._template is None:
            raise RequestError(
                "no_chat_template",
                f"{self._dir} has no chat template; send a prompt instead of messages, or add "
                "chat_template.jinja",
            )
        self._check_chars(_text_chars(messages), max_model_len)
        text = self._template.render(messages, self._max_chars(max_model_len), options)
        return self._encode_text(text, max_model_len, add_special_tokens=False)

    def _max_chars(self, max_model_len: int) -> int:
        return max_model_len * self._longest_token_chars * self._slack

    def _check_chars(self, chars: int, max_model_len: int) -> None:
        if chars > self._max_chars(max_model_len):
            raise RequestError(
                "too_long",
                f"prompt of {chars} characters cannot fit in max_model_len {max_model_len} "
                f"tokens of at most {self._longest_token_chars} characters; shorten it",
            )

    def _find_eos(self, config: Mapping[str, Any]) -> frozenset[int]:
        generation = self._read_json("generation_config.json")
        found = (config if generation is None else generation).get("eos_token_id")
        if found is None:
            found = config.get("eos_token_id")
        if found is None:
            return frozenset()
        ids = found if isinstance(found, list) else [found]
        if not all(isinstance(i, int) and 0 <= i < self.vocab_size for i in ids):
            raise ModelError(
                f"{self._dir}: eos_token_id {found!r} is not made of token ids below vocab_size "
                f"{self.vocab_size}; correct generation_config.json or config.json"
            )
        return frozenset(ids)

    def _load_tokenizer(self, special: Mapping[str, str]) -> Tokenizer | None:
        source = self._read_text("tokenizer.json")
        if source is None:
            return None
        try:
            tokenizer = Tokenizer.from_str(source)
        except Exception as error:  # the library raises bare Exception
            raise ModelError(f"{self._dir / 'tokenizer.json'}: {error}") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        known = {str(token.content) for token in tokenizer.get_added_tokens_decoder().values()}
        named = [
            t for t in special.values() if t not in known and tokenizer.token_to_id(t) is not None
        ]
        tokenizer.add_special_tokens([AddedToken(token, special=True) for token in named])
        return tokenizer

    def _index_vocabulary(self, tokenizer: Tokenizer) -> None:
        self._special_ids = frozenset(
            token_id
            for token_id, token in tokenizer.get_added_tokens_decoder().items()
            if token.special
        )
        vocabulary: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
        self._longest_token_chars = max(map(len, vocabulary), default=1)
        self._slack = 1 if tokenizer.normalizer is None else _NORMALIZER_SLACK
        if _has_byte_fallback(tokenizer):
            self._loose_byte_ids = frozenset(
                token_id for token, token_id in vocabulary.items() if _LOOSE_BYTE.fullmatch(token)
            )

    def _read_text(self, name: str) -> str | None:
        path = self._dir / name
        try:
            return path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(f"{path}: {error}") from error

    def _read_json(self, name: str) -> dict[str, Any] | None:
        source = self._read_text(name)
        if source is None:
            return None
        try:
            found = json.loads(source)
        except ValueError as error:
            raise ModelError(f"{self._dir / name} is not JSON: {error}") from error
        if not isinstance(found, dict):
            raise ModelError(f"{self._dir / name} does not hold a JSON object")
        return found


def _special_tokens(*sources: Mapping[str, Any]) -> dict[str, str]:
    """Tokens by their name (`bos_token`, …), the first source that has one first. A token is
    written as text or as an object with the key `content`."""
    tokens: dict[str, str] = {}
    for source in sources:
        for name, value in source.items():
            content = value.get("content") if isinstance(value, dict) else value
            if name.endswith("_token") and isinstance(content, str):
                tokens.setdefault(name, content)
    return tokens


def _has_byte_fallback(tokenizer: Tokenizer) -> bool:
    decoder = tokenizer.decoder
    if isinstance(decoder, decoders.ByteFallback):
        return True
    return isinstance(decoder, decoders.Sequence) and "ByteFallback" in json.dumps(
        json.loads(tokenizer.to_str())["decoder"]
    )


def _text_chars(messages: Sequence[Mapping[str, Any]]) -> int:
    """Characters of all text in the messages, however deep."""
    chars = 0
    todo: list[Any] = list(messages)
    while todo:
        value = todo.pop()
        if isinstance(value, str):
            chars += len(value)
        elif isinstance(value, Mapping):
            todo.extend(value.values())
        elif isinstance(value, list | tuple):
            todo.extend(value)
    return chars
