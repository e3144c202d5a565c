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


class StageLink:
    """Starts copies whenever something is ready and its lane is free, and tells the stage when a
    Prefetch is complete. Its commands go to `out`.

    piece_bytes: most bytes of one StartCopy, but at least a block.
    depth: most copies under way in each direction.
    merge: how moves become copies.
    """

    def __init__(
        self, index: int, piece_bytes: int, depth: int, merge: Merge, out: list[Command]
    ) -> None:
        self.index = index
        self.bit = 1 << index
        """This stage's bit in `HostBlock.to_store`."""
        self.block_bytes = 0
        self.num_blocks = 0
        self.attached = False
        """Its pool is mapped for this epoch."""
        self.computed = -1
        """Last step of this epoch that it computed."""
        self.lanes: dict[Direction, Lane] = {direction: Lane() for direction in DIRECTIONS}
        self.postponed: dict[HostBlock, list[tuple[Job, Move]]] = {}
        """Loads that wait for the store of their block on this stage."""
        self._epoch = -1
        self._piece_bytes = piece_bytes
        self._depth = depth
        self._merge = merge
        self._out = out

    @property
    def busy(self) -> bool:
        """Copies are under way or queued."""
        return any(lane.busy for lane in self.lanes.values())

    def attach(self, num_blocks: int, block_bytes: int) -> None:
        self.num_blocks = num_blocks
        self.block_bytes = block_bytes
        self.attached = True

    def void(self, epoch: int) -> int:
        """Enters `epoch` and forgets all jobs. Returns how many copies under way became void."""
        self._epoch = epoch
        self.attached = False
        self.computed = -1
        self.postponed.clear()
        return sum(lane.void() for lane in self.lanes.values())

    def add(self, direction: Direction, job: Job) -> None:
        """Queues a job and starts what can start."""
        if not job.outstanding:
            self._complete(direction, job)
            return
        self.lanes[direction].add(job, self.computed)
        self.pump(direction)

    def advance(self, step: int) -> None:
        """The stage has computed `step`."""
        if step <= self.computed:
            return
        self.computed = step
        for direction, lane in self.lanes.items():
            if lane.gated and lane.gated[0][0] <= step:
                lane.open_gates(step)
                self.pump(direction)

    def pump(self, direction: Direction) -> None:
        """Starts the most urgent pieces as long as another copy may be under way."""
        lane = self.lanes[direction]
        if not lane.ready or not self.attached:
            return
        limit = max(1, self._piece_bytes // self.block_bytes)
        while len(lane.running) < self._depth and (job := lane.first()) is not None:
            moves = self._take_piece(direction, job, limit)
            if moves:
                lane.running.append(Copy(job, moves))
                self._out.append(StartCopy(self.index, direction, self._merge(moves)))

    def end_copy(self, direction: Direction) -> Copy:
        """The oldest copy under way in this direction has ended. Starts nothing yet."""
        lane = self.lanes[direction]
        if not lane.running:
            raise InvariantError(f"a {direction} on stage {self.index} ended that never started")
        copy = lane.running.popleft()
        if not copy.void and lane.settle(copy.job, len(copy.moves)):
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
            if self.lanes["load"].settle(job, 1):
                self._complete("load", job)

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
        if cancelled and self.lanes[direction].settle(job, cancelled):
            self._complete(direction, job)
        return moves

    def _complete(self, direction: Direction, job: Job) -> None:
        """Nothing of `job` is left to do. A Store is answered by block, when all stages have it."""
        if direction == "load":
            loaded = Loaded(epoch=self._epoch, step=job.priority)
            self._out.append(SendToStage(self.index, loaded))
