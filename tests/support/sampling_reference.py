"""How tokens are to be picked, by the plainest possible code in float64: whole histories, one rule
at a time, in the order of vLLM's v1 sampler."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from pipemax.proto.messages.control import SampleRow, SampleRules
from pipemax.proto.messages.types import pack_i32

F64 = npt.NDArray[np.float64]


@dataclass
class Rules:
    """A request's rules and all its tokens."""

    presence: float = 0.0
    frequency: float = 0.0
    repetition: float = 1.0
    biases: dict[int, float] = field(default_factory=dict)
    allowed: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    prompt: tuple[int, ...] = ()

    def message(self, output: Sequence[int]) -> SampleRules:
        return SampleRules(
            self.presence,
            self.frequency,
            self.repetition,
            pack_i32(sorted(set(self.prompt))),
            pack_i32(output),
            pack_i32(self.biases),
            tuple(self.biases.values()),
            pack_i32(self.allowed),
            tuple(map(pack_i32, self.bad_words)),
        )

    def apply(self, logits: F64, output: Sequence[int], banned: Sequence[int] = ()) -> F64:
        changed = logits.astype(np.float64)
        for token in range(changed.size):
            if (self.allowed and token not in self.allowed) or token in banned:
                changed[token] = -np.inf
        without = changed.copy()
        for word in self.bad_words:
            before = list(word[:-1])
            if before == list(output)[len(output) - len(before) :]:
                without[word[-1]] = -np.inf
        if np.isfinite(without).any():
            changed = without
        for token, bias in self.biases.items():
            changed[token] += bias
        for token in {*self.prompt, *output}:
            stronger = changed[token] > 0
            changed[token] *= 1 / self.repetition if stronger else self.repetition
        for token in set(output):
            changed[token] -= self.frequency * list(output).count(token) + self.presence
        return changed


def probabilities(logits: F64, row: SampleRow) -> F64:
    """By the documented order: banned tokens, temperature, min_p, top_k, top_p."""
    scaled = logits.astype(np.float64)
    scaled[list(row.banned_token_ids)] = -np.inf
    scaled /= row.temperature
    p = np.exp(scaled - scaled.max())
    p /= p.sum()
    p[p < row.min_p * p.max()] = 0.0
    order = np.argsort(-p, kind="stable")
    if row.top_k > 0:
        p[order[row.top_k :]] = 0.0
    p /= p.sum()
    mass = 0.0
    for token in order:
        if mass >= row.top_p:
            p[token] = 0.0
        mass += p[token]
    return p / p.sum()
