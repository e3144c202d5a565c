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
from functools import cached_property
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from pipemax.coordinator.candidates import Candidate as Candidate
from pipemax.coordinator.candidates import Candidates, Some, columns_of
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


@dataclass(frozen=True, slots=True)
class SelectionProblem:
    host: Some
    device: Some
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


class Selection:
    """Who was chosen, in the order in which they were taken."""

    def __init__(self, slot: "_Slot", greedy_objective: float) -> None:
        self._host, self._device = slot.host, slot.device
        self.objective = slot.objective
        """Blocks."""
        self.greedy_objective = greedy_objective
        """Of the greedy initialisation alone."""

    @cached_property
    def host(self) -> tuple[Candidate, ...]:
        return tuple(map(self._host.columns.__getitem__, self._host.taken))

    @cached_property
    def device(self) -> tuple[Candidate, ...]:
        return tuple(map(self._device.columns.__getitem__, self._device.taken))

    @property
    def host_keys(self) -> list[int]:
        return self._host.keys

    @property
    def device_keys(self) -> list[int]:
        return self._device.keys

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Selection):
            return NotImplemented
        mine = (self.host, self.device, self.objective, self.greedy_objective)
        return mine == (other.host, other.device, other.objective, other.greedy_objective)

    __hash__ = None  # type: ignore[assignment]


def select(problem: SelectionProblem, refine: bool = True) -> Selection:
    """Pure and deterministic. `refine=False` stops after the greedy initialisation."""
    slot = _Slot(problem)
    slot.fill_greedily()
    greedy = slot.objective
    if refine:
        slot.refine()
    return Selection(slot, greedy)


class _Pool:
    """Candidates of one kind, by their indices in `columns`: forced, taken after them, and left."""

    def __init__(self, candidates: Some) -> None:
        self.columns: Candidates = columns_of(candidates)
        self.order = self.columns.by_wait()
        """Who waited longest first."""
        self.taken: list[int] = []
        self.left: list[int] = []
        self.num_forced = 0

    @property
    def keys(self) -> list[int]:
        keys: list[int] = self.columns.keys[self.taken].tolist() if self.taken else []
        return keys

    def window(self, round_number: int) -> tuple[list[int], list[int]]:
        """Requests a round may drop (the last taken first) and those it may add (the longest
        waiting first); later rounds look further from the boundary, and start over."""
        movable = self.taken[self.num_forced :][::-1]
        return _turned(movable, round_number), _turned(self.left, round_number)

    def swap(self, drop: Sequence[int], add: Sequence[int]) -> None:
        for index in drop:
            self.taken.remove(index)
        for index in add:
            self.left.remove(index)
        # In front: not in order of waiting any more, but near the boundary.
        self.left[:0] = drop
        self.taken.extend(add)


_Move = tuple[Sequence[int], Sequence[int]]
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
        self._fill_from_host(self.host.order[self.host.num_forced :], blocked)
        self._fill_from_device(self.device.order[self.device.num_forced :])

    def _fill_from_host(self, waiting: Ints, blocked: bool) -> None:
        """In order of waiting, whoever fits into the room that those before it left. `blocked`:
        nobody does."""
        problem = self.problem
        loads = self.host.columns.load_blocks[waiting]
        is_taken = np.zeros(len(waiting), np.bool_)
        places = problem.max_requests - self.requests
        room = problem.room_blocks - self.load_blocks
        todo = np.arange(0 if blocked else len(waiting))
        while places > 0 and room > 0 and len(todo):
            todo = todo[loads[todo] <= room]
            # Each of these fits alone: as many are taken as fit together, and the next is passed.
            count = int(np.searchsorted(np.cumsum(loads[todo]), room, "right"))
            now, todo = todo[: min(places, count)], todo[count:]
            is_taken[now] = True
            places -= len(now)
            room -= int(loads[now].sum())
        self._take(self.host, waiting[is_taken], loads=True)
        self.host.left = [] if blocked else waiting[~is_taken].tolist()

    def _fill_from_device(self, waiting: Ints) -> None:
        """In order of waiting, while each brings the step's time closer to T*."""
        problem = self.problem
        places = max(0, problem.max_requests - self.requests)
        contexts = self.device.columns.context_tokens[waiting[:places]]
        requests = self.requests + np.arange(len(contexts) + 1)
        tokens = self.context_tokens + np.concatenate((_ZERO, np.cumsum(contexts)))
        off_s = np.abs(problem.cost.times_s(requests, tokens) - problem.target_s)
        is_worse = off_s[1:] >= off_s[:-1]
        count = int(is_worse.argmax()) if is_worse.any() else len(contexts)
        self._take(self.device, waiting[:count], loads=False)
        self.device.left = waiting[count:].tolist()

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
            turns = pool.columns.last_turns[pool.order]
            # In order of waiting: all who are overdue come first.
            overdue = pool.order[: int((problem.turn - turns >= problem.overdue_after).sum())]
            count = min(len(overdue), max(0, problem.max_requests - self.requests))
            if pool is self.host:
                loads = pool.columns.load_blocks[overdue[:count]]
                exceeds = (np.cumsum(loads) > problem.room_blocks) & (loads > 0)
                if exceeds.any():
                    blocked = True
                    count = int(exceeds.argmax())
            self._take(pool, overdue[:count], loads=pool is self.host)
            pool.num_forced = count
        return blocked

    def _take(self, pool: _Pool, indices: Ints, *, loads: bool) -> None:
        pool.taken += indices.tolist()
        self.requests += len(indices)
        self.context_tokens += int(pool.columns.context_tokens[indices].sum())
        if loads:
            self.load_blocks += int(pool.columns.load_blocks[indices].sum())

    def _improve(self, window: int, best: float) -> bool:
        """Apply the best move of this window if it lowers the objective."""
        found = self._best_move(window, best)
        if found is None:
            return False
        for pool, (drop, add) in zip((self.host, self.device), found, strict=True):
            pool.swap(drop, add)
            for indices, sign in ((drop, -1), (add, 1)):
                self.requests += sign * len(indices)
                self.context_tokens += sign * int(pool.columns.context_tokens[indices].sum())
                if pool is self.host:
                    self.load_blocks += sign * int(pool.columns.load_blocks[indices].sum())
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
        added, dropped = (_group_sums(pool.columns, i) for i in (self._left, self._movable))
        sums = added[:, None, :] - dropped[:, :, None]
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


def _group_sums(columns: Candidates, indices: Sequence[int]) -> Ints:
    """Requests, blocks and tokens of every group of these, [3, group]."""
    members = _MEMBERS[len(indices)]
    if not len(indices):
        return np.zeros((3, members.shape[1]), np.int64)
    values = np.array(
        [[1] * len(indices), columns.load_blocks[indices], columns.context_tokens[indices]]
    )
    sums: Ints = values @ members
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


def _turned(indices: Sequence[int], round_number: int) -> list[int]:
    """The window of a round; the list is taken for a ring."""
    if len(indices) <= WINDOW:
        return list(indices)
    start = round_number * WINDOW % len(indices)
    part = list(indices[start : start + WINDOW])
    return part + list(indices[: WINDOW - len(part)])
