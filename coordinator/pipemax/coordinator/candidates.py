"""Requests that a policy chooses from, as columns.

A policy looks at hundreds of them in every step: sums and orders over columns cost a hundredth of
what a loop over objects does. `Candidate` is one of them, for code that looks at few.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
_FEWEST_ROWS = 64


class Candidate(NamedTuple):
    key: int
    last_turn: int
    """Step that last moved the request forward, -1 for none; small is long ago."""
    load_blocks: int
    """Blocks to bring from the host."""
    context_tokens: int


class Candidates:
    """[candidates] each. Not to be changed; true views of a pool are good until it changes."""

    __slots__ = ("context_tokens", "keys", "last_turns", "load_blocks")

    def __init__(
        self, keys: Ints, last_turns: Ints, load_blocks: Ints, context_tokens: Ints
    ) -> None:
        self.keys = keys
        self.last_turns = last_turns
        self.load_blocks = load_blocks
        self.context_tokens = context_tokens

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> Candidate:
        return Candidate(
            int(self.keys[index]),
            int(self.last_turns[index]),
            int(self.load_blocks[index]),
            int(self.context_tokens[index]),
        )

    def __iter__(self) -> Iterator[Candidate]:
        return map(self.__getitem__, range(len(self)))

    def those(self, chosen: NDArray[np.bool_] | Ints) -> "Candidates":
        """Some of them, by a mask or by their indices."""
        return Candidates(
            self.keys[chosen],
            self.last_turns[chosen],
            self.load_blocks[chosen],
            self.context_tokens[chosen],
        )

    def by_wait(self) -> Ints:
        """Their indices, who waited longest first; among those, who came first."""
        order: Ints = np.lexsort((self.keys, self.last_turns))
        return order


Some = Sequence[Candidate] | Candidates


def columns_of(candidates: Some) -> Candidates:
    if isinstance(candidates, Candidates):
        return candidates
    table = np.array(candidates, np.int64).reshape(len(candidates), len(Candidate._fields))
    return Candidates(*np.ascontiguousarray(table.T))


class CandidatePool:
    """Candidates that come and go one by one."""

    def __init__(self) -> None:
        self._table: Ints = np.zeros((len(Candidate._fields), _FEWEST_ROWS), np.int64)
        self._row_of: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._row_of)

    def __contains__(self, key: object) -> bool:
        return key in self._row_of

    def put(self, candidate: Candidate) -> None:
        """Adds it, or takes it for the one of the same key."""
        row = self._row_of.setdefault(candidate.key, len(self._row_of))
        if row == self._table.shape[1]:
            self._table = np.concatenate((self._table, np.zeros_like(self._table)), axis=1)
        self._table[:, row] = candidate

    def discard(self, key: int) -> None:
        row = self._row_of.pop(key, None)
        if row is None:
            return
        last = len(self._row_of)
        if row != last:
            self._table[:, row] = self._table[:, last]
            self._row_of[int(self._table[0, row])] = row

    def columns(self) -> Candidates:
        """Of all, in no order. A view: good until the pool changes."""
        return Candidates(*self._table[:, : len(self._row_of)])

    @property
    def num_load_blocks(self) -> int:
        """To bring from the host for all of them together."""
        return int(self._table[2, : len(self._row_of)].sum())
