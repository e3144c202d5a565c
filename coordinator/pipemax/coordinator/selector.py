"""The two-stage greedy selector: which requests fill a slot's next turn.

It chooses H among the host-resident candidates and D among the device-resident ones so that

    |budget − Σ_H load_blocks| + λ · |T(H ∪ D) − T*|        [blocks]

is small, where T = δ + α·(requests) + β·(context tokens) is the step's predicted time and T* the
mean slot time, both in seconds. λ, in blocks per second, is what the slowest link carries, so the
second term is in blocks as well: those that the link could bring in the time by which this slot
is longer or shorter than the others. One block of budget left unused and one block's time of
imbalance thus weigh the same: either way the link, or the pipeline, idles for as long.

Σ_H load_blocks never exceeds the budget or the staging blocks, |H| + |D| never `max_requests`.

1. *Greedy initialisation*: in order of waiting, host-resident requests while budget and staging
   allow, then device-resident ones while they bring T closer to T*.
2. *Local refinement*: drop up to three and add up to three requests of each kind at once, the best
   such move per round, among those next to where the greedy pass stopped, as long as that lowers
   the objective. Every round looks at another window; the number of rounds, and of moves tried in
   each, is bounded by a constant, not by a clock: the same problem has the same answer everywhere.

Nobody starves: who waited `overdue_after` turns goes before everything else, in order of waiting,
and is not dropped again. If the first overdue host-resident request does not fit, no other is
loaded, so that what the link and the pool gain is kept for it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from operator import attrgetter
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipemax.coordinator.cost_model import LinearCost

WINDOW = 5
"""Requests on each side of the boundary that a round of refinement looks at."""
MOVED_AT_ONCE = 3
"""Requests of a kind that one move drops at most, and that it adds at most."""
MAX_ROUNDS = 4
"""Rounds of refinement at most."""
ROUNDS_IN_VAIN = 2
"""Windows without a move that helps, after which a further one is not looked at."""
GOOD_ENOUGH = 0.002
"""Refinement ends when the objective is at most this share of the budget, or of what the link
carries in T*: no link and no step is that even."""

_by_turn, _by_key = attrgetter("last_turn"), attrgetter("key")
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
_GROUPS = [
    [group for size in range(MOVED_AT_ONCE + 1) for group in combinations(range(of), size)]
    for of in range(WINDOW + 1)
]
"""By number of requests: every group of up to MOVED_AT_ONCE of them, nobody first."""
_MEMBERS = [
    np.array([[i in group for group in groups] for i in range(of)], np.int64).reshape(
        of, len(groups)
    )
    for of, groups in enumerate(_GROUPS)
]
"""The same as matrices, [request, group]: 1 for who is in it."""
_ZERO = np.zeros(1, np.int64)


class Candidate(NamedTuple):
    """Made anew whenever a request moves: a plain tuple is several times cheaper to make."""

    key: int
    last_turn: int
    """Step that last moved the request forward, -1 for none; small is long ago."""
    load_blocks: int
    """Blocks to bring from the host."""
    context_tokens: int


@dataclass(frozen=True, slots=True)
class SelectionProblem:
    host: Sequence[Candidate]
    device: Sequence[Candidate]
    """Their `load_blocks` are not counted."""
    budget_blocks: int
    staging_blocks: int
    max_requests: int
    cost: LinearCost
    """Of the step; what is already in it is part of `fixed_s`."""
    target_s: float
    """T*."""
    blocks_per_s: float
    """λ."""
    turn: int
    """Number of the step being filled."""
    overdue_after: int
    """Turns after which a request goes before all that waited less; at least 1."""

    @property
    def room_blocks(self) -> int:
        return max(0, min(self.budget_blocks, self.staging_blocks))

    def objective(self, load_blocks: int, requests: int, context_tokens: int) -> float:
        """In blocks; see the module. The arguments are sums over what is chosen."""
        off_s = abs(self.cost.time_s(requests, context_tokens) - self.target_s)
        return max(0, self.budget_blocks - load_blocks) + self.blocks_per_s * off_s

    def is_overdue(self, candidate: Candidate) -> bool:
        return self.turn - candidate.last_turn >= self.overdue_after


@dataclass(frozen=True, slots=True)
class Selection:
    host: tuple[Candidate, ...]
    device: tuple[Candidate, ...]
    objective: float
    """Blocks."""
    greedy_objective: float
    """Of the greedy initialisation alone."""


def by_wait(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Who waited longest first. Two stable sorts by one number each: much faster than one by
    pairs."""
    return sorted(sorted(candidates, key=_by_key), key=_by_turn)


def select(problem: SelectionProblem, refine: bool = True) -> Selection:
    """Pure and deterministic. `refine=False` stops after the greedy initialisation."""
    slot = _Slot(problem)
    slot.fill_greedily()
    greedy = slot.objective
    if refine:
        slot.refine()
    return Selection(tuple(slot.host.taken), tuple(slot.device.taken), slot.objective, greedy)


class _Pool:
    """Candidates of one kind in order of waiting: forced, taken after them, and left."""

    def __init__(self, candidates: Sequence[Candidate]) -> None:
        self.taken: list[Candidate] = []
        self.left = by_wait(candidates)
        self.num_forced = 0

    def window(self, round_number: int) -> tuple[list[Candidate], list[Candidate]]:
        """Requests a round may drop (the last taken first) and those it may add (the longest
        waiting first); later rounds look further from the boundary, and start over."""
        movable = self.taken[self.num_forced :][::-1]
        return _turned(movable, round_number), _turned(self.left, round_number)

    def swap(self, drop: Sequence[Candidate], add: Sequence[Candidate]) -> None:
        for candidate in drop:
            self.taken.remove(candidate)
        for candidate in add:
            self.left.remove(candidate)
        # In front: not in order of waiting any more, but near the boundary.
        self.left[:0] = drop
        self.taken.extend(add)


_Move = tuple[Sequence[Candidate], Sequence[Candidate]]
"""Whom to drop and whom to add, of one kind."""


class _Slot:
    """The sums over what is chosen, and the moves that change them."""

    def __init__(self, problem: SelectionProblem) -> None:
        self.problem = problem
        self.host = _Pool(problem.host)
        self.device = _Pool(problem.device)
        self.load_blocks = 0
        self.requests = 0
        self.context_tokens = 0

    @property
    def objective(self) -> float:
        return self.problem.objective(self.load_blocks, self.requests, self.context_tokens)

    def fill_greedily(self) -> None:
        blocked = self._force_overdue()
        problem, room = self.problem, self.problem.room_blocks
        left: list[Candidate] = []
        pending = iter(() if blocked else self.host.left)
        for candidate in pending:
            if self.requests >= problem.max_requests or self.load_blocks >= room:
                left.append(candidate)
                break
            if self.load_blocks + candidate.load_blocks <= room:
                self._take(self.host, candidate, candidate.load_blocks)
            else:
                left.append(candidate)
        left.extend(pending)
        self.host.left = left
        cost, target = problem.cost, problem.target_s
        count = 0
        for candidate in self.device.left:
            tokens = self.context_tokens + candidate.context_tokens
            now = cost.time_s(self.requests, self.context_tokens)
            then = cost.time_s(self.requests + 1, tokens)
            if self.requests >= problem.max_requests or abs(then - target) >= abs(now - target):
                break
            self._take(self.device, candidate, 0)
            count += 1
        del self.device.left[:count]

    def refine(self) -> None:
        problem = self.problem
        enough = GOOD_ENOUGH * max(problem.budget_blocks, problem.blocks_per_s * problem.target_s)
        in_vain = 0
        for round_number in range(MAX_ROUNDS):
            before = self.objective
            if before <= enough or in_vain > min(ROUNDS_IN_VAIN, self._last_window()):
                return
            in_vain = 0 if self._improve(round_number, before) else in_vain + 1

    def _last_window(self) -> int:
        """Windows after the first until all candidates were looked at."""
        pools = (self.host, self.device)
        return max(len(side) for pool in pools for side in (pool.taken, pool.left)) // WINDOW

    def _force_overdue(self) -> bool:
        """Take who waited too long; returns whether one of them blocks the link for the others."""
        problem = self.problem
        blocked = False
        for pool in (self.host, self.device):
            count = 0
            for candidate in pool.left:
                load = candidate.load_blocks if pool is self.host else 0
                if not problem.is_overdue(candidate) or self.requests >= problem.max_requests:
                    break
                if self.load_blocks + load > problem.room_blocks and load:
                    blocked = True
                    break
                self._take(pool, candidate, load)
                count += 1
            pool.num_forced = count
            del pool.left[:count]
        if blocked:
            self.host.left = []
        return blocked

    def _take(self, pool: _Pool, candidate: Candidate, load_blocks: int) -> None:
        pool.taken.append(candidate)
        self.load_blocks += load_blocks
        self.requests += 1
        self.context_tokens += candidate.context_tokens

    def _improve(self, window: int, best: float) -> bool:
        """Apply the best move of this window if it lowers the objective."""
        found = self._best_move(window, best)
        if found is None:
            return False
        for pool, (drop, add) in zip((self.host, self.device), found, strict=True):
            pool.swap(drop, add)
            for candidates, sign in ((drop, -1), (add, 1)):
                self.requests += sign * len(candidates)
                self.context_tokens += sign * sum([c.context_tokens for c in candidates])
                if pool is self.host:
                    self.load_blocks += sign * sum([c.load_blocks for c in candidates])
        return True

    def _best_move(self, window: int, best: float) -> tuple[_Move, _Move] | None:
        """What to drop and to add of the host-resident and of the device-resident requests; None
        when nothing in this window beats `best`.

        For each move of host-resident requests that stays within the room, the device move that
        fits best beside it; but only where what the first leaves of the budget, and the time that
        no device move could make up for, are less than `best`. All moves at once, as arrays.
        """
        problem = self.problem
        cost, rate = problem.cost, problem.blocks_per_s
        all_missing_s = problem.target_s - cost.time_s(self.requests, self.context_tokens)
        host, device = _Moves(self.host, window), _Moves(self.device, window)
        loads = self.load_blocks + host.blocks
        unused = np.maximum(problem.budget_blocks - loads, 0)
        missing_s = all_missing_s - host.added_s(cost)
        allowed = loads <= problem.room_blocks
        allowed[0] = True  # to leave all as it is stays within the room
        added_s = device.added_s(cost)
        least_s = np.maximum(missing_s - added_s.max(), added_s.min() - missing_s)
        least = unused + rate * np.maximum(least_s, 0.0)
        tried = np.flatnonzero(allowed & (least < best))
        if not len(tried):
            return None
        most = problem.max_requests - self.requests - host.requests[tried]
        off_s, device_moves = _closest(missing_s[tried], most, added_s, device.requests)
        values = unused[tried] + rate * off_s
        first = int(values.argmin())
        if values[first] >= best - 1e-9 * best:
            return None
        return host.move(int(tried[first])), device.move(int(device_moves[first]))


class _Moves:
    """Every way to drop up to MOVED_AT_ONCE of a window's taken requests and to add up to as many
    of those left; the first is to do neither. One array element each."""

    def __init__(self, pool: _Pool, window: int) -> None:
        self._movable, self._left = pool.window(window)
        self._num_adds = len(_GROUPS[len(self._left)])
        if not self._movable and not self._left:
            self.requests = self.blocks = self.tokens = _ZERO
            return
        sums = _group_sums(self._left)[:, None, :] - _group_sums(self._movable)[:, :, None]
        self.requests, self.blocks, self.tokens = sums.reshape(3, -1)

    def added_s(self, cost: LinearCost) -> Floats:
        """What each move adds to the step's time."""
        added_s: Floats = cost.per_request_s * self.requests + cost.per_token_s * self.tokens
        return added_s

    def move(self, number: int) -> _Move:
        drop, add = divmod(number, self._num_adds)
        return (
            [self._movable[i] for i in _GROUPS[len(self._movable)][drop]],
            [self._left[i] for i in _GROUPS[len(self._left)][add]],
        )


def _group_sums(candidates: Sequence[Candidate]) -> Ints:
    """Requests, blocks and tokens of every group of these, [3, group]."""
    members = _MEMBERS[len(candidates)]
    blocks = [c.load_blocks for c in candidates]
    tokens = [c.context_tokens for c in candidates]
    sums: Ints = np.array([[1] * len(candidates), blocks, tokens], np.int64) @ members
    return sums


def _closest(missing_s: Floats, most: Ints, added_s: Floats, requests: Ints) -> tuple[Floats, Ints]:
    """For each of `missing_s`, the move of at most `most` requests more whose `added_s` is closest
    to it: by how much it is off, in seconds (infinite where there is none), and its number."""
    if len(added_s) == 1:
        off_s = np.where(most >= 0, np.abs(missing_s), np.inf)
        return off_s, np.zeros(len(missing_s), np.int64)
    if len(missing_s) == 1:
        off_s = np.where(requests <= most[0], np.abs(added_s - missing_s[0]), np.inf)
        found = np.array([off_s.argmin()])
        return off_s[found], found
    best_s = np.full(len(missing_s), np.inf)
    best_move = np.zeros(len(missing_s), np.int64)
    if most.min() >= MOVED_AT_ONCE:
        groups = [(-MOVED_AT_ONCE, np.arange(len(added_s)))]
    else:
        # Places are few: a move may have to add fewer requests than would fit best.
        counts = range(-MOVED_AT_ONCE, MOVED_AT_ONCE + 1)
        groups = [(count, np.flatnonzero(requests == count)) for count in counts]
    for count, unsorted in groups:
        if not len(unsorted):
            continue
        members = unsorted[np.argsort(added_s[unsorted], kind="stable")]
        times_s = added_s[members]
        after = np.searchsorted(times_s, missing_s)
        for near in (np.maximum(after - 1, 0), np.minimum(after, len(members) - 1)):
            off_s = np.where(most >= count, np.abs(times_s[near] - missing_s), np.inf)
            closer = off_s < best_s
            best_s = np.where(closer, off_s, best_s)
            best_move = np.where(closer, members[near], best_move)
    return best_s, best_move


def _turned(candidates: Sequence[Candidate], round_number: int) -> list[Candidate]:
    """The window of a round; the list is taken for a ring."""
    if len(candidates) <= WINDOW:
        return list(candidates)
    start = round_number * WINDOW % len(candidates)
    part = list(candidates[start : start + WINDOW])
    return part + list(candidates[: WINDOW - len(part)])
