"""What a request's rules do to its logits, kept up to date token by token.

Order and meaning are vLLM's (its v1 sampler): allowed tokens, grammar, bad words, biases, then
the penalties of repetition, frequency and presence. All of it is float32.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from pipemax.proto.messages.control import SampleRules
from pipemax.proto.messages.types import I32
from pipemax.stage_worker.sampling.guide import Guide

F32Array = npt.NDArray[np.float32]
I32Array = npt.NDArray[np.int32]

_NEVER: Final = np.float32("-inf")
_FIRST_ROOM: Final = 64


class TokenRules:
    """One request's rules and what they depend on: which tokens there were, and how often."""

    def __init__(self, rules: SampleRules, guide: Guide | None = None) -> None:
        """guide: of the rules' grammar, if they have one."""
        self._guide = guide
        self._presence = np.float32(rules.presence_penalty)
        self._frequency = np.float32(rules.frequency_penalty)
        self._repetition = np.float32(rules.repetition_penalty)
        self._biased = _ids(rules.biased_token_ids)
        self._biases = np.array(rules.biases, np.float32)
        self._allowed = np.unique(_ids(rules.allowed_token_ids))
        self._bad_words = tuple(tuple(_ids(word).tolist()) for word in rules.bad_words)
        self._tail_tokens = max(map(len, self._bad_words), default=1) - 1
        self._tail: tuple[int, ...] = ()
        """The last output tokens, as many as a bad word has before its last."""
        self._output = _Counts()
        self._seen = _Counts()
        """Of prompt and output; how often does not matter."""
        self.num_outputs = 0
        for token in _ids(rules.prompt_token_ids).tolist():
            self._seen.add(token)
        for token in _ids(rules.output_token_ids).tolist():
            self.append(token)

    def append(self, token: int) -> None:
        """`token` is the request's next output token."""
        self.num_outputs += 1
        if self._guide is not None:
            self._guide.append(token)
        if self._repetition != 1.0:
            self._seen.add(token)
        if self._frequency or self._presence:
            self._output.add(token)
        if self._tail_tokens:
            self._tail = (*self._tail, token)[-self._tail_tokens :]

    def apply(self, logits: F32Array, banned: Sequence[int]) -> bool:
        """Changes one row of logits, `[vocab]`, in place. `banned` tokens cannot be picked either.
        If nothing is left to pick, bad words are picked after all. False when a grammar leaves
        nothing: no token can be picked."""
        if self._allowed.size:
            kept = logits[self._allowed]
            logits[:] = _NEVER
            logits[self._allowed] = kept
        logits[list(banned)] = _NEVER
        if self._guide is not None:
            allowed = self._guide.allowed()
            if not allowed.any():
                return False
            logits[~allowed] = _NEVER
        ends = [word[-1] for word in self._bad_words if self._ends_now(word)]
        if ends:
            lifted = logits[ends]
            logits[ends] = _NEVER
            if not np.isfinite(logits).any():
                logits[ends] = lifted
        if self._biased.size:
            logits[self._biased] += self._biases
        self._penalise(logits)
        return True

    def _ends_now(self, word: tuple[int, ...]) -> bool:
        """The output ends in all of `word` but its last token."""
        before = word[:-1]
        return not before or self._tail[-len(before) :] == before

    def _penalise(self, logits: F32Array) -> None:
        if self._repetition != 1.0:
            seen = self._seen.tokens
            values = logits[seen]
            logits[seen] = np.where(
                values > 0, values / self._repetition, values * self._repetition
            )
        output = self._output.tokens
        logits[output] -= self._frequency * self._output.counts
        logits[output] -= self._presence


class _Counts:
    """How often each of some tokens was added, as two arrays that grow."""

    def __init__(self) -> None:
        self._place: dict[int, int] = {}
        self._tokens = np.empty(_FIRST_ROOM, np.int32)
        self._counts = np.empty(_FIRST_ROOM, np.float32)

    @property
    def tokens(self) -> I32Array:
        return self._tokens[: len(self._place)]

    @property
    def counts(self) -> F32Array:
        """Of `tokens`."""
        return self._counts[: len(self._place)]

    def add(self, token: int) -> None:
        place = self._place.get(token)
        if place is not None:
            self._counts[place] += 1
            return
        place = len(self._place)
        if place == self._tokens.size:
            self._tokens = np.resize(self._tokens, 2 * place)
            self._counts = np.resize(self._counts, 2 * place)
        self._place[token] = place
        self._tokens[place] = token
        self._counts[place] = 1


def _ids(column: I32) -> I32Array:
    return np.frombuffer(column, "<i4").astype(np.int32)
