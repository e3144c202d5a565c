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

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter, itemgetter
from typing import NamedTuple

from pipemax.coordinator.cost_model import LinearCost

WINDOW = 5
"""Requests on each side of the boundary that a round of refinement looks at."""
MOVED_AT_ONCE = 3
"""Requests of a kind that one move drops at most, and that it adds at most."""
MAX_ROUNDS = 8
"""Rounds of refinement at most."""
ROUNDS_IN_VAIN = 2
"""Windows without a move that helps, after which a further one is not looked at."""
GOOD_ENOUGH = 0.002
"""Refinement ends when the objective is at most this share of the budget, or of what the link
carries in T*: no link and no step is that even."""

_by_turn, _by_key, _blocks_of = attrgetter("last_turn"), attrgetter("key"), itemgetter(0)


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


_Part = tuple[int, int, int, tuple[Candidate, ...]]
"""Blocks, requests, context tokens, and whose sums they are."""
_NOBODY: _Part = (0, 0, 0, ())


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
        for pool, drop, add in ((self.host, *found[:2]), (self.device, *found[2:])):
            pool.swap(drop[3], add[3])
            self.load_blocks += add[0] - drop[0] if pool is self.host else 0
            self.requests += add[1] - drop[1]
            self.context_tokens += add[2] - drop[2]
        return True

    def _best_move(self, window: int, best: float) -> tuple[_Part, _Part, _Part, _Part] | None:
        """What to drop and to add of the host-resident and of the device-resident requests; None
        when nothing in this window beats `best`.

        For each move of host-resident requests that stays within the room, the device move that
        fits best beside it; but only where what the first leaves of the budget, and the time that
        no device move could make up for, are less than the best found so far.
        """
        problem = self.problem
        alpha, beta, rate = (
            problem.cost.per_request_s,
            problem.cost.per_token_s,
            problem.blocks_per_s,
        )
        budget, room = problem.budget_blocks, problem.room_blocks
        most = problem.max_requests - self.requests
        all_missing_s = problem.target_s - problem.cost.time_s(self.requests, self.context_tokens)
        device = _DeviceMoves(self, window)
        longest_s, shortest_s = device.longest_s, device.shortest_s
        movable, left = self.host.window(window)
        adds = _parts(left)
        loads = [part[0] for part in adds]
        found = None
        best -= 1e-9 * best
        for dropped in _parts(movable):
            kept = self.load_blocks - dropped[0]
            last = bisect_right(loads, room - kept)
            if not dropped[1]:
                last = max(last, 1)  # to leave all as it is stays within the room
            for a in range(last - 1, -1, -1):
                added = adds[a]
                unused = budget - kept - added[0]
                if unused < 0:
                    unused = 0
                elif unused >= best:
                    break
                count = added[1] - dropped[1]
                missing_s = all_missing_s - alpha * count - beta * (added[2] - dropped[2])
                if missing_s > longest_s:
                    off_s = missing_s - longest_s
                elif missing_s < shortest_s:
                    off_s = shortest_s - missing_s
                else:
                    off_s = 0.0
                if unused + rate * off_s >= best:
                    continue
                off_s, device_drop, device_add = device.closest(missing_s, most - count)
                value = unused + rate * off_s
                if value < best:
                    found = (dropped, added, device_drop, device_add)
                    best = value - 1e-9 * value
        return found


class _DeviceMoves:
    """Moves of device-resident requests, by the time they add to the step."""

    def __init__(self, slot: _Slot, window: int) -> None:
        cost = slot.problem.cost
        movable, left = slot.device.window(window)
        adds = [(cost.share_s(part[1], part[2]), i, part) for i, part in enumerate(_parts(left))]
        drops = [
            (cost.share_s(part[1], part[2]), i, part) for i, part in enumerate(_parts(movable))
        ]
        adds.sort()
        drops.sort()
        self._drops = drops
        self.longest_s = adds[-1][0] - drops[0][0]
        self.shortest_s = adds[0][0] - drops[-1][0]
        if slot.requests + 2 * MOVED_AT_ONCE > slot.problem.max_requests:
            # Places are few: a move may have to add fewer requests than would fit best.
            counts = range(MOVED_AT_ONCE + 1)
            groups = [[add for add in adds if add[2][1] == count] for count in counts]
        else:
            groups = [adds]
        self._groups = [
            (count, [add[0] for add in group], group) for count, group in enumerate(groups) if group
        ]

    def closest(self, missing_s: float, most: int) -> tuple[float, _Part, _Part]:
        """The move of at most `most` requests more whose time is closest to `missing_s`: by how
        much it is off, in seconds, what it drops and what it adds."""
        best_s, best_drop, best_add = float("inf"), _NOBODY, _NOBODY
        for drop_s, _, drop in self._drops:
            wanted_s = missing_s + drop_s
            for count, times, adds in self._groups:
                if count > most + drop[1]:
                    break
                after = bisect_left(times, wanted_s)
                if after < len(times) and times[after] - wanted_s < best_s:
                    best_s, best_drop, best_add = times[after] - wanted_s, drop, adds[after][2]
                if after and wanted_s - times[after - 1] < best_s:
                    best_s, best_drop, best_add = (
                        wanted_s - times[after - 1],
                        drop,
                        adds[after - 1][2],
                    )
        return best_s, best_drop, best_add


def _parts(candidates: Sequence[Candidate]) -> list[_Part]:
    """None, and every group of up to MOVED_AT_ONCE of `candidates`, sorted by blocks."""
    parts: list[_Part] = [_NOBODY]
    for one in candidates:
        parts += [
            (blocks + one.load_blocks, count + 1, tokens + one.context_tokens, (*group, one))
            for blocks, count, tokens, group in parts
            if count < MOVED_AT_ONCE
        ]
    parts.sort(key=_blocks_of)
    return parts


def _turned(candidates: Sequence[Candidate], round_number: int) -> list[Candidate]:
    """The window of a round; the list is taken for a ring."""
    if len(candidates) <= WINDOW:
        return list(candidates)
    start = round_number * WINDOW % len(candidates)
    part = list(candidates[start : start + WINDOW])
    return part + list(candidates[: WINDOW - len(part)])
