"""Which requests take part in a step: the interface, and the plain policy.

A policy is pure and deterministic. It is asked twice per step: one turn ahead, which host-resident
requests to prefetch; and at planning, which device-resident ones to add.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Candidate:
    key: int
    last_turn: int
    """Step that last moved the request forward, -1 for none; small is long ago."""
    load_blocks: int
    """Blocks to bring from the host."""
    context_tokens: int


@dataclass(frozen=True, slots=True)
class SlotTarget:
    """A slot's even share of what can run now."""

    requests: int
    context_tokens: int


class SelectionPolicy(Protocol):
    def choose_prefetch(
        self, candidates: Sequence[Candidate], budget_blocks: int, free_blocks: int
    ) -> list[int]:
        """Keys to prefetch. Their `load_blocks` sum to at most the smaller of the link's budget
        and the free staging blocks."""
        ...

    def choose_residents(
        self, candidates: Sequence[Candidate], chosen: Sequence[Candidate], target: SlotTarget
    ) -> list[int]:
        """Keys of device-resident requests to run beside those already `chosen`."""
        ...


class OldestFirst:
    """Fills the prefetch budget with those who waited longest, then evens out request counts.

    Nobody starves: the one who waited longest is never passed over for a later one that happens to
    be smaller.
    """

    def choose_prefetch(
        self, candidates: Sequence[Candidate], budget_blocks: int, free_blocks: int
    ) -> list[int]:
        room = min(budget_blocks, free_blocks)
        chosen: list[int] = []
        for candidate in _by_wait(candidates):
            if candidate.load_blocks > room:
                break
            room -= candidate.load_blocks
            chosen.append(candidate.key)
        return chosen

    def choose_residents(
        self, candidates: Sequence[Candidate], chosen: Sequence[Candidate], target: SlotTarget
    ) -> list[int]:
        places = max(0, target.requests - len(chosen))
        return [candidate.key for candidate in _by_wait(candidates)[:places]]


def _by_wait(candidates: Sequence[Candidate]) -> list[Candidate]:
    return sorted(candidates, key=lambda c: (c.last_turn, c.key))
