"""Token ids to text while they are being produced, and stop strings in that text.

A token may hold part of a character, and what a token reads as can depend on its neighbours: a
leading space is dropped at the start of the text only; bytes join to characters. So the text is
kept in two parts: *settled* text that later tokens cannot change, and a *window* of the last
tokens, decoded anew with every token. The last settled tokens are decoded with it, as context, and
cut off again: the window then never looks like the start of the text, and a character that began
before it is whole.
"""

from collections.abc import Sequence
from typing import Protocol

from pipemax.proto.messages.ingest import SamplingParams

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""What decoders put for bytes that are not (yet) a character."""
_CHARACTER_TOKENS = 4
"""Most tokens one character can be spread over: UTF-8 takes at most four bytes for one."""
_CONTEXT_TOKENS = _CHARACTER_TOKENS - 1
_LONGEST_WINDOW = 32
"""Bounds the work per token when output never comes to the end of a character."""


class TokenDecoder(Protocol):
    """What detokenising needs of a tokenizer."""

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str: ...

    def is_special(self, token_id: int) -> bool: ...

    def is_loose_byte(self, token_id: int) -> bool:
        """True for the byte tokens (`<0xE2>`) of a vocabulary with byte fallback. How a run of
        them reads is decided at its end: one bad byte turns the whole run into U+FFFD."""
        ...


class Detokenizer:
    """Incremental decoding of one request's output.

    After any number of tokens `text` equals decoding all of them at once. (One exception, which
    is not valid text in any case: within a run of more than 32 byte-fallback tokens, a bad byte
    does not change the reading of the bytes long before it.)
    """

    def __init__(self, decoder: TokenDecoder, skip_special_tokens: bool) -> None:
        self._decoder = decoder
        self._skip_special_tokens = skip_special_tokens
        self._settled = ""
        self._context: list[int] = []
        """The last settled tokens but for loose bytes, which would join the window's bytes."""
        self._context_chars = 0
        self._window: list[int] = []
        self._window_text = ""

    @property
    def text(self) -> str:
        """Everything so far; a character still incomplete at the end reads as U+FFFD."""
        return self._settled + self._window_text

    @property
    def settled_chars(self) -> int:
        """Length of the front part of `text` that no further token changes."""
        return len(self._settled)

    @property
    def readable_text(self) -> str:
        """`text` without an incomplete character at the end."""
        return self._settled + self._window_text.rstrip(REPLACEMENT)

    def settled(self, start: int) -> str:
        """The settled text from a character on."""
        return self._settled[start:]

    def append(self, token_id: int) -> str:
        """Takes one token; returns the text that became settled, often empty, never part of a
        character."""
        if self._skip_special_tokens and self._decoder.is_special(token_id):
            return ""  # as decoding all at once does: neighbours join across it
        self._window.append(token_id)
        self._window_text = self._decode_window(self._window)
        count = len(self._window)
        complete = not self._window_text.endswith(REPLACEMENT)
        loose = self._decoder.is_loose_byte(token_id)
        if complete and (not loose or count > _LONGEST_WINDOW):
            return self._settle(count)
        if count > (2 * _LONGEST_WINDOW if loose else _LONGEST_WINDOW):
            # Whatever lies across this cut has ended by now.
            return self._settle(count - _CHARACTER_TOKENS)
        return ""

    def finish(self) -> str:
        """Settles and returns what is left, an incomplete character included."""
        return self._settle(len(self._window))

    def _settle(self, count: int) -> str:
        """Settles the first `count` tokens of the window; a character that lies across the cut is
        settled too."""
        kept = self._window[count:]
        context = [*self._context, *self._window[:count]]
        context = [i for i in context if not self._decoder.is_loose_byte(i)][-_CONTEXT_TOKENS:]
        self._context, self._context_chars = context, len(self._decode(context))
        kept_text = self._decode_window(kept)
        settled = self._window_text[: len(self._window_text) - len(kept_text)]
        self._settled += settled
        self._window, self._window_text = kept, kept_text
        return settled

    def _decode_window(self, token_ids: list[int]) -> str:
        """Text of `token_ids` after the context."""
        return self._decode(self._context + token_ids)[self._context_chars :] if token_ids else ""

    def _decode(self, token_ids: list[int]) -> str:
        return self._decoder.decode(token_ids, self._skip_special_tokens)


class StopChecker:
    """One request's output text and its stop strings.

    A stop string counts when it is completed by a token after the first `min_tokens`, whatever
    tokens it is spread over. Of several, the one whose last character comes first is met (the
    longest, if they end together), so the result does not depend on how text falls into tokens.

    `decoder` is None for a model without a tokenizer: the text is then empty, and the request may
    have no stop strings.
    """

    __slots__ = (
        "_cut",
        "_decoder",
        "_detokenizer",
        "_longest_stop",
        "_sampling",
        "_searched",
        "_token_ids",
    )

    def __init__(
        self,
        decoder: TokenDecoder | None,
        sampling: SamplingParams,
        *,
        stream: bool = False,
    ) -> None:
        """stream: `sure_text` will be asked for."""
        self._decoder = decoder
        self._sampling = sampling
        self._token_ids: list[int] = []
        # Else nobody looks at the text before the end: decode once, then.
        self._detokenizer = (
            Detokenizer(decoder, sampling.skip_special_tokens)
            if decoder and (sampling.stop or stream)
            else None
        )
        self._longest_stop = max(map(len, sampling.stop), default=0)
        self._searched = 0
        """Characters at the front of the text in which no match may end any more."""
        self._cut: int | None = None

    def append(self, token_id: int) -> str | None:
        """Takes one output token; returns the stop string it completes, if any."""
        self._token_ids.append(token_id)
        detokenizer = self._detokenizer
        if detokenizer is None or self._cut is not None:
            return None
        detokenizer.append(token_id)
        text = detokenizer.readable_text
        if len(self._token_ids) <= self._sampling.min_tokens:
            self._searched = len(text)
            return None
        match = self._first_match(text)
        if match is None:
            self._searched = max(self._searched, detokenizer.settled_chars)
            return None
        start, stop = match
        self._cut = start + len(stop) if self._sampling.include_stop_str_in_output else start
        return stop

    def take_all(self, token_ids: Sequence[int]) -> None:
        """Takes all output tokens at once, where nobody has looked at the text before."""
        assert self._detokenizer is None
        self._token_ids = list(token_ids)

    @property
    def token_ids(self) -> list[int]:
        """All output tokens so far."""
        return self._token_ids

    def sure_text(self, start: int) -> str:
        """What is known, from a character on, of the front part of the result's text: no further
        token changes it, and no stop string that may yet be completed begins in it. Known so if the
        last token ended nothing; needs `stream`."""
        if self._detokenizer is None:
            return ""
        text = self._detokenizer.settled(max(0, start - self._longest_stop))
        keep = len(text) - self._begun_stop(text)
        return text[min(start, self._longest_stop) : keep]

    def _begun_stop(self, text: str) -> int:
        """Length of the longest end of `text` that a stop string begins with."""
        for begin in range(max(0, len(text) - self._longest_stop + 1), len(text)):
            end = text[begin:]
            if any(len(stop) > len(end) and stop.startswith(end) for stop in self._sampling.stop):
                return len(end)
        return 0

    def text(self, *, stopped_by_token: bool = False) -> str:
        """The result's text: up to the stop string if one was met, else everything.

        `stopped_by_token`: the last token was end-of-sequence or a stop token; it is left out,
        unless `include_stop_str_in_output`.
        """
        if self._decoder is None:
            return ""
        if self._cut is not None and self._detokenizer is not None:
            return self._detokenizer.text[: self._cut]
        leave_out = stopped_by_token and not self._sampling.include_stop_str_in_output
        token_ids = self._token_ids[:-1] if leave_out else self._token_ids
        return self._decoder.decode(token_ids, self._sampling.skip_special_tokens)

    def _first_match(self, text: str) -> tuple[int, str] | None:
        """Start and string of the match that ends first after the searched part."""
        found: list[tuple[int, int, str]] = []
        for stop in self._sampling.stop:
            start = text.find(stop, max(0, self._searched - len(stop) + 1))
            if start >= 0:
                found.append((start + len(stop), start, stop))
        if not found:
            return None
        _, start, stop = min(found)
        return start, stop
