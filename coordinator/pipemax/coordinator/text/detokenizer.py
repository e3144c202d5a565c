"""Token ids to text while they are being produced, and stop strings in that text.

A token may hold part of a character, and what a token reads as can depend on its neighbours: a
leading space is dropped at the start of the text only; bytes join to characters. So the text is
kept in two parts: *settled* text that later tokens cannot change, and a *window* of the last
tokens, decoded anew with every token. One settled token before the window is decoded with it and
cut off again, so that the window never looks like the start of the text.
"""

from collections.abc import Sequence
from typing import Protocol

from pipemax.proto.messages.ingest import SamplingParams

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""What decoders put for bytes that are not (yet) a character."""
_LONGEST_CHARACTER = 4
"""Bytes of UTF-8's longest character, so the most tokens one character can be spread over."""
_LONGEST_WINDOW = 32
"""Bounds the work per token when output is an endless run of loose bytes."""


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
        """The last settled token that is not a loose byte, if there is one. (A loose byte would
        join the window's bytes.)"""
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

    def append(self, token_id: int) -> str:
        """Takes one token; returns the text that became settled, often empty, never part of a
        character."""
        if self._skip_special_tokens and self._decoder.is_special(token_id):
            return ""  # as decoding all at once does: neighbours join across it
        self._window.append(token_id)
        self._window_text = self._decode_after(self._context, self._window)
        count = len(self._window)
        complete = not self._window_text.endswith(REPLACEMENT)
        loose = self._decoder.is_loose_byte(token_id)
        if complete and (not loose or count > _LONGEST_WINDOW):
            return self._settle(count)
        if count > (2 * _LONGEST_WINDOW if loose else _LONGEST_WINDOW):
            return self._settle(self._boundary())
        return ""

    def finish(self) -> str:
        """Settles and returns what is left, an incomplete character included."""
        return self._settle(len(self._window))

    def _settle(self, count: int) -> str:
        """Settles the first `count` tokens of the window."""
        kept = self._window[count:]
        context = self._context_at(count)
        kept_text = self._decode_after(context, kept)
        settled = self._window_text[: len(self._window_text) - len(kept_text)]
        self._settled += settled
        self._context, self._window, self._window_text = context, kept, kept_text
        return settled

    def _boundary(self) -> int:
        """Tokens to settle of a window grown too long: up to a boundary between characters.

        A character lies across at most three neighbouring token boundaries, and whether it does
        is certain once four tokens follow; so one of four candidates is a true boundary, and only
        there do the two sides read the same apart as together.
        """
        longest = len(self._window) - _LONGEST_CHARACTER
        for count in range(longest, longest - _LONGEST_CHARACTER, -1):
            front = self._decode_after(self._context, self._window[:count])
            back = self._decode_after(self._context_at(count), self._window[count:])
            if front + back == self._window_text:
                return count
        return longest

    def _context_at(self, count: int) -> list[int]:
        """The context once the first `count` tokens of the window are settled."""
        for token_id in reversed(self._window[:count]):
            if not self._decoder.is_loose_byte(token_id):
                return [token_id]
        return self._context

    def _decode_after(self, context: list[int], token_ids: list[int]) -> str:
        """Text of `token_ids` when they follow `context`."""
        if not token_ids:
            return ""
        whole = self._decode(context + token_ids)
        return whole[len(self._decode(context)) :] if context else whole

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

    def __init__(self, decoder: TokenDecoder | None, sampling: SamplingParams) -> None:
        self._decoder = decoder
        self._sampling = sampling
        self._token_ids: list[int] = []
        # Without stop strings nobody looks at the text before the end: decode once, then.
        self._detokenizer = (
            Detokenizer(decoder, sampling.skip_special_tokens)
            if decoder and sampling.stop
            else None
        )
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
