"""The KV daemon's core: state and decisions, no I/O, no clock.

One pass through the file: a Store gives its blocks host blocks and queues their copies on every
stage; a Prefetch queues copies the other way; `Computed` opens the gates of both; each end of a
copy starts the next one and may complete a Store (Stored), a Prefetch (Loaded) or a Release
(Released). A reset voids all of it except what is wholly stored.

On CUDA `Computed` says that a step is queued, not that it is over. Its gates open all the same, and
each copy names the event it has to wait for: what a step filled is read, and what it read is
overwritten, behind that step on the device. `Loaded` says likewise that the copies are queued. All
else goes by copies that have really ended: a host block is read once it is stored, and given away
once no copy touches it. A new epoch begins when nothing of the old one runs any more: the daemon
answers a reset after its last void copy, a stage after the last step it had queued (ResetDone).
"""

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from itertools import chain, count, groupby
from operator import attrgetter

from pipemax.kv_daemon import invariants
from pipemax.kv_daemon.events import (
    DIRECTIONS,
    Command,
    ContradictionError,
    CopyDone,
    Direction,
    Event,
    FromStage,
    LayOutHost,
    MapPool,
    NewCoordinator,
    PoolMapped,
    SendToCoordinator,
    SendToStage,
)
from pipemax.kv_daemon.host_blocks import UNPLACED, HostBlock, HostTable
from pipemax.kv_daemon.stage_link import Merge, StageLink
from pipemax.kv_daemon.transfers import Copy, Job, Move, merge
from pipemax.proto.errors import PipemaxSystemError
from pipemax.proto.messages.control import (
    BlockMove,
    Drop,
    Prefetch,
    Release,
    Released,
    Reset,
    ResetDone,
    Store,
    Stored,
)
from pipemax.proto.messages.kv import AttachPool, Computed, PoolAttached

PIECE_BYTES = 4 * 2**20
"""Most bytes of one StartCopy (but at least a block). More urgent work waits for at most DEPTH
of them."""
DEPTH = 2
"""Most copies under way per stage and direction. While the engine is busy with one, the next waits
behind it, so that the link does not idle for the way through the poll loop."""


class KvCore:
    """State of the daemon. `handle` is the only way to change it.

    num_stages: stages of the pipeline; all must attach before anything is stored.
    host_bytes: size of the host pool; 0 works and stores nothing.
    piece_bytes, depth: see PIECE_BYTES and DEPTH; depth 1 is the plain form.
    merge_runs: how moves become copies; `transfers.unmerged` is the plain form.
    orders_computing: a stage orders its computing behind copies that are under way (see
        Loaded.copy), so that it is told of a Prefetch as soon as its last copy was started.
    """

    def __init__(
        self,
        num_stages: int,
        host_bytes: int,
        piece_bytes: int = PIECE_BYTES,
        depth: int = DEPTH,
        merge_runs: Merge = merge,
        *,
        orders_computing: bool = False,
    ) -> None:
        self.epoch = -1
        self._out: list[Command] = []
        self.stages = tuple(
            StageLink(index, piece_bytes, depth, merge_runs, self._out, orders_computing)
            for index in range(num_stages)
        )
        self.table = HostTable(0)
        self.waiting: deque[tuple[int, Move]] = deque()
        """(after, move) of stores that wait for a draining host block. The coordinator counts a
        host block free as soon as it sends Drop, which may be a copy's length before it is."""
        self.host_bytes = host_bytes
        self._laid_out = False
        self.pending_releases: Counter[int] = Counter()
        """Requests with a Release that waits for copies to end, and how many."""
        self._reset_seen = False
        self._reset_done = False
        self.void_running = 0
        """Copies under way that a reset made void."""
        self._all_bits = (1 << num_stages) - 1
        self._store_order = count()

    def handle(self, event: Event, now: float) -> list[Command]:
        """What to do about `event`, in this order. `now` is the cores' common clock argument; no
        decision here depends on the time.

        Raises ContradictionError when the coordinator asks for what cannot be, PipemaxSystemError
        when a stage changed its geometry. The state is undefined afterwards.
        """
        match event:
            case CopyDone():
                self._on_copy_done(self.stages[event.stage], event.direction)
            case FromStage(message=Computed() as message):
                if message.epoch == self.epoch:
                    self.stages[event.stage].advance(message.step, message.event)
            case Prefetch() if event.epoch == self.epoch:
                self._on_prefetch(event)
            case Store() if event.epoch == self.epoch:
                self._on_store(event)
            case Drop() if event.epoch == self.epoch:
                self._forget(self.table.blocks_from(event.request, event.first_index))
                self._place_waiting()
            case Release() if event.epoch == self.epoch:
                self._on_release(event)
            case Reset():
                self._on_reset(event)
            case FromStage(message=AttachPool() as message):
                self._on_attach(message)
            case NewCoordinator():
                self._void_everything(-1)
                self._forget(list(self.table))
            case PoolMapped():
                self._on_pool_mapped(event)
            case _:
                # An older epoch never happened. A newer one without its Reset was meant for the
                # daemon that ran before this one: the coordinator has yet to hear of the restart.
                pass
        commands = self._out.copy()
        self._out.clear()
        return commands

    # What the shell reports.

    @property
    def busy(self) -> bool:
        """Copies are under way or queued."""
        return any(stage.busy for stage in self.stages)

    @property
    def host_blocks_total(self) -> int:
        return self.table.free.total

    @property
    def host_blocks_used(self) -> int:
        """Stored, being stored or draining."""
        return self.table.free.total - self.table.free.num_free

    def queued_load_bytes(self) -> tuple[int, ...]:
        """By stage: bytes of Prefetches not yet copied."""
        return tuple(s.lanes["load"].outstanding * s.block_bytes for s in self.stages)

    def check_invariants(self) -> None:
        """Raises InvariantError when the state contradicts itself. O(everything): for tests."""
        invariants.check(self)

    # Resets and attachments.

    def _on_reset(self, event: Reset) -> None:
        if event.epoch > self.epoch:
            self._void_everything(event.epoch)
        elif event.epoch < self.epoch or self._reset_seen:
            return
        # Else an AttachPool overtook this Reset; nothing was planned in this epoch before it.
        self._reset_seen = True
        if not event.keep_host_blocks:
            self._forget(list(self.table))
        self._answer_reset()

    def _void_everything(self, epoch: int) -> None:
        """Enters `epoch`. Copies under way run on, but their end only sets their blocks free."""
        self.epoch = epoch
        self._reset_seen = self._reset_done = False
        self.void_running += sum(stage.void(epoch) for stage in self.stages)
        self.waiting.clear()
        self.pending_releases.clear()
        self._forget(list(self.table.storing))

    def _on_attach(self, offer: AttachPool) -> None:
        if offer.epoch > self.epoch:
            self._void_everything(offer.epoch)
        if offer.epoch != self.epoch:
            return
        stage = self.stages[offer.stage]
        if stage.attached and stage.incarnation != offer.incarnation:
            raise ContradictionError(
                f"stage {stage.index} was started again, and epoch {self.epoch} goes on: what its "
                "predecessor had under way would count as stored"
            )
        self._out.append(MapPool(offer))

    def _on_pool_mapped(self, event: PoolMapped) -> None:
        offer = event.offer
        if offer.epoch != self.epoch:
            return
        stage = self.stages[offer.stage]
        if stage.block_bytes not in (0, offer.block_bytes):
            raise PipemaxSystemError(
                f"stage {stage.index} came back with blocks of {offer.block_bytes} bytes instead "
                f"of {stage.block_bytes}; restart the whole system after changing model or dtype"
            )
        stage.attach(offer.num_blocks, offer.block_bytes, offer.incarnation)
        answer = PoolAttached(epoch=self.epoch, loaded=event.loaded, region=event.region)
        self._out.append(SendToStage(stage.index, answer))
        if all(stage.attached for stage in self.stages):
            self._lay_out()
            self._answer_reset()
        for direction in DIRECTIONS:
            stage.pump(direction)

    def _lay_out(self) -> None:
        if self._laid_out:
            return
        self._laid_out = True
        block_bytes = tuple(stage.block_bytes for stage in self.stages)
        self.table = HostTable(self.host_bytes // sum(block_bytes))
        self._out.append(LayOutHost(self.table.free.total, block_bytes))

    def _answer_reset(self) -> None:
        ready = self._reset_seen and all(stage.attached for stage in self.stages)
        if ready and not self.void_running and not self._reset_done:
            self._reset_done = True
            done = ResetDone(epoch=self.epoch, num_host_blocks=self.table.free.total)
            self._out.append(SendToCoordinator(done))

    # What the coordinator asks for.

    def _on_prefetch(self, event: Prefetch) -> None:
        moves = []
        of_request: Mapping[int, HostBlock] = {}
        requests: set[int] = set()
        request = -1
        storing = 0
        for move in self._checked(event.blocks):
            if move.request != request:
                request = move.request
                requests.add(request)
                of_request = self.table.of_request(request)
            block = of_request.get(move.index)
            if block is None:
                raise ContradictionError(
                    f"prefetch for step {event.step} names block {move.index} of request "
                    f"{request}, which the host does not hold"
                )
            storing |= block.to_store
            moves.append(_new_move(Move, (block, move.device_block)))
        moves.sort(key=_places)
        shared = tuple(moves)
        for stage in self.stages:
            suspect = bool(storing & stage.bit)
            size = len(shared)
            job = Job(event.step, event.after, shared, requests, size, size, suspect=suspect)
            stage.add("load", job)

    def _on_store(self, event: Store) -> None:
        in_order = sorted(self._checked(event.blocks), key=lambda move: (move.request, move.index))
        stored: list[HostBlock] = []
        moves: list[Move] = []
        for _, group in groupby(in_order, key=lambda move: move.request):
            of_request = list(group)
            for position, (request, index, device_block) in enumerate(map(_fields, of_request)):
                block = self.table.find(request, index)
                if block is None:
                    block = self.table.add(request, index, self._all_bits)
                    move = Move(block, device_block)
                    if self._place(move, len(of_request) - position, event.after):
                        moves.append(move)
                elif not block.to_store:
                    stored.append(block)
        self._queue_stores(event.after, moves)
        self._answer_stored(stored)

    def _on_release(self, event: Release) -> None:
        requests = event.requests
        firsts = event.first_indices or (0,) * len(requests)
        if len(firsts) != len(requests):
            raise ContradictionError(
                f"a release names {len(requests)} requests and {len(firsts)} first blocks"
            )
        named = dict(zip(requests, firsts, strict=True))
        self._forget([b for key, i in named.items() for b in self.table.blocks_from(key, i)])
        self.pending_releases.update(key for key in named if self.table.is_draining(key))
        self._answer_released(tuple(key for key in named if key not in self.pending_releases))
        self._place_waiting()

    def _checked(self, moves: Sequence[BlockMove]) -> Sequence[BlockMove]:
        num_blocks = min([stage.num_blocks for stage in self.stages])
        beyond = max(map(_device_block, moves), default=-1)
        if beyond >= num_blocks:
            raise ContradictionError(f"device block {beyond} of {num_blocks} was named")
        return moves

    # Host blocks.

    def _place(self, move: Move, wanted: int, after: int) -> bool:
        """Gives a new block a host block, or lets it wait for one that is draining."""
        if self.table.free.num_free:
            self.table.place(move.block, wanted)
            return True
        if len(self.waiting) >= len(self.table.draining):
            raise ContradictionError(
                f"all {self.table.free.total} host blocks are taken, and block "
                f"{move.block.index} of request {move.block.request} is to be stored"
            )
        self.waiting.append((after, move))
        return False

    def _place_waiting(self) -> None:
        while self.waiting and self.table.free.num_free:
            after, move = self.waiting.popleft()
            self.table.place(move.block, 1)
            self._queue_stores(after, [move])

    def _queue_stores(self, after: int, moves: list[Move]) -> None:
        if not moves:
            return
        moves.sort(key=lambda move: move.block.host_id)
        shared = tuple(moves)
        requests = {move.block.request for move in moves}
        order = next(self._store_order)
        for stage in self.stages:
            stage.add("store", Job(order, after, shared, requests, len(shared), len(shared)))

    def _forget(self, blocks: list[HostBlock]) -> None:
        """Drops `blocks`: their queued copies will be skipped, their host blocks are free once no
        copy touches them."""
        if not blocks:
            return
        requests = {block.request for block in blocks}
        for stage in self.stages:
            stage.suspect(requests)
            if stage.postponed:
                for block in blocks:
                    stage.cancel_loads(block)
        under_copy = chain.from_iterable(stage.under_copy() for stage in self.stages)
        self.table.forget(blocks, under_copy)
        if any(block.host_id == UNPLACED for block in blocks):
            self.waiting = deque(entry for entry in self.waiting if not entry[1].block.dropped)

    # Copies.

    def _on_copy_done(self, stage: StageLink, direction: Direction) -> None:
        copy = stage.end_copy(direction)
        stored: list[HostBlock] = []
        if copy.void:
            self.void_running -= 1
        elif direction == "store":
            stored = self._part_stored(stage, copy)
            stage.pump("load")
        stage.pump(direction)
        released: tuple[int, ...] = ()
        if self.table.draining:
            at_rest = {b.request for b, _ in copy.moves if b.dropped and self.table.copy_ended(b)}
            asked = sorted(at_rest & self.pending_releases.keys())
            released = tuple(key for key in asked for _ in range(self.pending_releases.pop(key)))
        self._answer_stored(stored)
        self._answer_released(released)
        self._place_waiting()
        self._answer_reset()

    def _part_stored(self, stage: StageLink, copy: Copy) -> list[HostBlock]:
        """Stage `stage`'s part of these blocks is in host memory. Returns those wholly stored."""
        stored = []
        for block, _ in copy.moves:
            if block.dropped:
                continue
            if self.table.part_stored(block, stage.bit):
                stored.append(block)
            stage.resume_loads(block)
        return stored

    # Answers.

    def _answer_stored(self, blocks: list[HostBlock]) -> None:
        if blocks:
            requests = tuple(block.request for block in blocks)
            indices = tuple(block.index for block in blocks)
            message = Stored(epoch=self.epoch, requests=requests, indices=indices)
            self._out.append(SendToCoordinator(message))

    def _answer_released(self, requests: tuple[int, ...]) -> None:
        if requests:
            self._out.append(SendToCoordinator(Released(epoch=self.epoch, requests=requests)))


_new_move = tuple.__new__
"""Hundreds of blocks per prefetch: the constructor of a named tuple is Python and takes longer."""


_places = attrgetter("block.host_id", "device_block")
_device_block = attrgetter("device_block")


def _fields(move: BlockMove) -> tuple[int, int, int]:
    return move.request, move.index, move.device_block
