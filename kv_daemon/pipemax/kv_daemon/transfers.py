"""The queue of copies of one stage in one direction, and how neighbours merge into one copy."""

import heapq
import itertools
from collections import deque
from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from typing import NamedTuple

from pipemax.kv_daemon.events import Run
from pipemax.kv_daemon.host_blocks import HostBlock


class Move(NamedTuple):
    """One block and where it lies, or shall lie, on the devices."""

    block: HostBlock
    device_block: int


def merge(moves: Sequence[Move]) -> tuple[Run, ...]:
    """Moves as copies: blocks that follow each other on both sides become one run."""
    runs: list[Run] = []
    host = device = count = 0
    for block, device_block in moves:
        if count and block.host_id == host + count and device_block == device + count:
            count += 1
            continue
        if count:
            runs.append(Run(host, device, count))
        host, device, count = block.host_id, device_block, 1
    if count:
        runs.append(Run(host, device, count))
    return tuple(runs)


def unmerged(moves: Sequence[Move]) -> tuple[Run, ...]:
    """The plain form of `merge`: one copy per block. For comparison in tests and benchmarks."""
    return tuple(Run(move.block.host_id, move.device_block, 1) for move in moves)


@dataclass(slots=True, eq=False)
class Job:
    """One Prefetch or Store on one stage."""

    priority: int
    """Smaller goes first: the step of a Prefetch, the order of arrival of a Store."""
    after: int
    """The last step that must be computed before the first copy."""
    moves: tuple[Move, ...]
    """In the order of host blocks; shared by the jobs of all stages."""
    requests: Set[int]
    """Whose blocks these are; shared as well."""
    outstanding: int
    """Moves not done and not cancelled."""
    unstarted: int
    """Moves neither started nor cancelled."""
    last_copy: int = -1
    """Number of the last copy started for it."""
    cursor: int = 0
    """Moves before this one were started, cancelled or postponed."""
    late: list[Move] = field(default_factory=list)
    """Moves that were postponed until the block was stored on this stage, and now may start."""
    suspect: bool = False
    """Some of the moves left may be of a block that was dropped or, in a load, is not stored yet.
    Eight stages share one list of moves: looking at each move is most of the work."""
    queued: bool = True
    """In the lane's queue; False when all that is left is under way or postponed."""

    @property
    def exhausted(self) -> bool:
        return self.cursor == len(self.moves) and not self.late

    def take(self, most: int) -> Sequence[Move]:
        """Up to `most` next moves, at least one. The job must not be exhausted."""
        if self.cursor < len(self.moves):
            taken: Sequence[Move] = self.moves
            if self.cursor or most < len(taken):
                taken = taken[self.cursor : self.cursor + most]
            self.cursor += len(taken)
            return taken
        taken = self.late[:most]
        del self.late[:most]
        return taken


@dataclass(slots=True, eq=False)
class Copy:
    """One StartCopy under way."""

    job: Job
    moves: Sequence[Move]
    void: bool = False
    """Started before the last reset: its end means nothing but that its blocks are at rest."""


class Lane:
    """Jobs of one stage in one direction, gated by computed steps, in priority order."""

    def __init__(self) -> None:
        self.running: deque[Copy] = deque()
        """Copies given to the engine, which carries them out in this order."""
        self.outstanding = 0
        """Moves of all jobs not done and not cancelled."""
        self.next_number = 0
        """Of copies; counts up over the life of the daemon."""
        self.ready: list[tuple[int, int, Job]] = []
        self.gated: list[tuple[int, int, Job]] = []
        self._order = itertools.count()

    @property
    def busy(self) -> bool:
        return bool(self.running) or self.outstanding > 0

    def add(self, job: Job, computed: int) -> None:
        self.outstanding += job.outstanding
        if job.after <= computed:
            self._push_ready(job)
        else:
            heapq.heappush(self.gated, (job.after, next(self._order), job))

    def open_gates(self, computed: int) -> None:
        while self.gated and self.gated[0][0] <= computed:
            self._push_ready(heapq.heappop(self.gated)[2])

    def first(self) -> Job | None:
        """The most urgent job that may start copies now; taken off the queue once exhausted."""
        while self.ready:
            job = self.ready[0][2]
            if not job.exhausted:
                return job
            heapq.heappop(self.ready)
            job.queued = False
        return None

    def resume(self, job: Job, move: Move) -> None:
        """A postponed move of `job` may start now."""
        job.late.append(move)
        if not job.queued:
            self._push_ready(job)

    def settle(self, job: Job, count: int) -> bool:
        """`count` moves of `job` are done or cancelled; says whether these were the last."""
        job.outstanding -= count
        self.outstanding -= count
        return job.outstanding == 0

    def suspect(self, requests: Set[int]) -> None:
        """Blocks of these requests were dropped: jobs waiting here may have moves of them."""
        for queue in (self.ready, self.gated):
            for _, _, job in queue:
                if not requests.isdisjoint(job.requests):
                    job.suspect = True

    def void(self) -> int:
        """Forgets all jobs. Returns how many copies under way became void."""
        self.ready.clear()
        self.gated.clear()
        self.outstanding = 0
        fresh = [copy for copy in self.running if not copy.void]
        for copy in fresh:
            copy.void = True
        return len(fresh)

    def _push_ready(self, job: Job) -> None:
        job.queued = True
        heapq.heappush(self.ready, (job.priority, next(self._order), job))
