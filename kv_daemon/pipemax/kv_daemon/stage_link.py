"""One stage as the core sees it: its pool, how far it has computed, and its copies both ways."""

from collections.abc import Callable, Iterator, Sequence, Set

from pipemax.kv_daemon.events import (
    DIRECTIONS,
    Command,
    Direction,
    Run,
    SendToStage,
    StartCopy,
)
from pipemax.kv_daemon.host_blocks import HostBlock
from pipemax.kv_daemon.transfers import Copy, Job, Lane, Move
from pipemax.proto.errors import InvariantError
from pipemax.proto.messages.kv import Loaded

Merge = Callable[[Sequence[Move]], tuple[Run, ...]]

MAX_PIECE_BLOCKS = 4096
"""However small blocks are: an order names each run, and messages are limited in size."""
KEPT_EVENTS = 32
"""Steps of which a stage's link knows the event. A stage has a few steps in flight; what is older
is over. Less than the length of a ring (see kv.Events), so that no number kept has fallen out."""


class StageLink:
    """Starts copies whenever something is ready and its lane is free, and tells the stage when a
    Prefetch is complete. Its commands go to `out`.

    piece_bytes: most bytes of one StartCopy, but at least a block.
    depth: most copies under way in each direction.
    merge: how moves become copies.
    orders_computing: the stage is told of a Prefetch when its last copy starts, not when it ends.
    """

    def __init__(
        self,
        index: int,
        piece_bytes: int,
        depth: int,
        merge: Merge,
        out: list[Command],
        orders_computing: bool = False,
    ) -> None:
        self.index = index
        self.bit = 1 << index
        """This stage's bit in `HostBlock.to_store`."""
        self.block_bytes = 0
        self.num_blocks = 0
        self.attached = False
        """Its pool is mapped for this epoch."""
        self.incarnation = ""
        """Of the process that attached last."""
        self.computed = -1
        """Last step of this epoch that it computed, or queued."""
        self._events: dict[int, int] = {}
        """Step → number of its event, of the latest steps in order."""
        self.lanes: dict[Direction, Lane] = {direction: Lane() for direction in DIRECTIONS}
        self.postponed: dict[HostBlock, list[tuple[Job, Move]]] = {}
        """Loads that wait for the store of their block on this stage."""
        self._epoch = -1
        self._piece_bytes = piece_bytes
        self._depth = depth
        self._merge = merge
        self._out = out
        self._orders_computing = orders_computing

    @property
    def busy(self) -> bool:
        """Copies are under way or queued."""
        return any(lane.busy for lane in self.lanes.values())

    def attach(self, num_blocks: int, block_bytes: int, incarnation: str) -> None:
        self.num_blocks = num_blocks
        self.block_bytes = block_bytes
        self.incarnation = incarnation
        self.attached = True

    def void(self, epoch: int) -> int:
        """Enters `epoch` and forgets all jobs. Returns how many copies under way became void."""
        self._epoch = epoch
        self.attached = False
        self.computed = -1
        self._events.clear()
        self.postponed.clear()
        return sum(lane.void() for lane in self.lanes.values())

    def add(self, direction: Direction, job: Job) -> None:
        """Queues a job and starts what can start."""
        if not job.outstanding:
            self._complete(direction, job)
            return
        self.lanes[direction].add(job, self.computed)
        self.pump(direction)

    def advance(self, step: int, event: int) -> None:
        """The stage has computed `step`, or has queued it and records this event behind it."""
        if step <= self.computed:
            return
        self.computed = step
        self._events[step] = event
        if len(self._events) > KEPT_EVENTS:
            del self._events[next(iter(self._events))]
        for direction, lane in self.lanes.items():
            if lane.gated and lane.gated[0][0] <= step:
                lane.open_gates(step)
                self.pump(direction)

    def pump(self, direction: Direction) -> None:
        """Starts the most urgent pieces as long as another copy may be under way."""
        lane = self.lanes[direction]
        if not lane.ready or not self.attached:
            return
        limit = min(max(1, self._piece_bytes // self.block_bytes), MAX_PIECE_BLOCKS)
        while len(lane.running) < self._depth and (job := lane.first()) is not None:
            moves = self._take_piece(direction, job, limit)
            if moves:
                self._start(direction, job, moves)

    def _start(self, direction: Direction, job: Job, moves: Sequence[Move]) -> None:
        lane = self.lanes[direction]
        lane.running.append(Copy(job, moves))
        number = lane.next_number
        lane.next_number += 1
        after = self._event_of(job.after)
        self._out.append(StartCopy(self.index, direction, self._merge(moves), number, after))
        job.last_copy = number
        job.unstarted -= len(moves)
        if self._orders_computing and not job.unstarted:
            self._complete(direction, job)

    def _event_of(self, step: int) -> int:
        """What to wait for so that `step`, which is computed or queued, is over; -1: nothing. A
        step too old to be known is, and the oldest known one that follows it costs no time."""
        if step < 0:
            return -1
        event = self._events.get(step)
        if event is None:
            event = next((n for known, n in self._events.items() if known > step), -1)
        return event

    def end_copy(self, direction: Direction) -> Copy:
        """The oldest copy under way in this direction has ended. Starts nothing yet."""
        lane = self.lanes[direction]
        if not lane.running:
            raise InvariantError(f"a {direction} on stage {self.index} ended that never started")
        copy = lane.running.popleft()
        if not copy.void:
            over = lane.settle(copy.job, len(copy.moves))
            if over and not self._orders_computing:
                self._complete(direction, copy.job)
        return copy

    def under_copy(self) -> Iterator[HostBlock]:
        """Each block once per copy under way that touches it."""
        for lane in self.lanes.values():
            for copy in lane.running:
                yield from [move.block for move in copy.moves]

    def resume_loads(self, block: HostBlock) -> None:
        """`block` is stored on this stage: loads that waited for that may start."""
        for job, move in self.postponed.pop(block, ()):
            self.lanes["load"].resume(job, move)

    def cancel_loads(self, block: HostBlock) -> None:
        """`block` will never be stored: the steps that wanted it go on without."""
        for job, _ in self.postponed.pop(block, ()):
            self._cancel("load", job, 1)

    def suspect(self, requests: Set[int]) -> None:
        """Blocks of these requests were dropped."""
        for lane in self.lanes.values():
            lane.suspect(requests)

    def _take_piece(self, direction: Direction, job: Job, limit: int) -> Sequence[Move]:
        """The next moves of `job`, at most `limit`; fewer, or none, where blocks were dropped or
        must be stored first."""
        if not job.suspect:
            return job.take(limit)
        not_yet = self.bit if direction == "load" else 0
        moves: list[Move] = []
        cancelled = 0
        while len(moves) < limit and not job.exhausted:
            for move in job.take(limit - len(moves)):
                if move.block.dropped:
                    cancelled += 1
                elif move.block.to_store & not_yet:
                    self.postponed.setdefault(move.block, []).append((job, move))
                else:
                    moves.append(move)
        if cancelled:
            self._cancel(direction, job, cancelled)
        return moves

    def _cancel(self, direction: Direction, job: Job, count: int) -> None:
        """`count` moves will never start."""
        job.unstarted -= count
        over = self.lanes[direction].settle(job, count)
        if over or (self._orders_computing and not job.unstarted):
            self._complete(direction, job)

    def _complete(self, direction: Direction, job: Job) -> None:
        """Nothing of `job` is left to do, or to start where that is enough. A Store is answered by
        block, when all stages have it."""
        if direction == "load":
            copy = job.last_copy if self._orders_computing else -1
            loaded = Loaded(epoch=self._epoch, step=job.priority, copy=copy)
            self._out.append(SendToStage(self.index, loaded))
