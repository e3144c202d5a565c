"""A lawful coordinator and its stages around the KV daemon's core, which compute steps in order.

Memories whose blocks hold tokens (`kv_memories`) show every copy made too early or too late, and
what the core says is held against what the coordinator knows.
"""

from collections.abc import Callable
from functools import partial

from pipemax.kv_daemon.core import KvCore
from pipemax.kv_daemon.events import (
    Command,
    CopyDone,
    Event,
    FromStage,
    LayOutHost,
    MapPool,
    PoolMapped,
    SendToCoordinator,
    SendToStage,
    StartCopy,
)
from pipemax.kv_daemon.transfers import merge, unmerged
from pipemax.proto.memory import MemfdHandle
from pipemax.proto.messages.control import (
    BlockMove,
    Drop,
    Released,
    Reset,
    ResetDone,
    Store,
    Stored,
)
from pipemax.proto.messages.kv import AttachPool, Computed, Loaded, PoolAttached
from support.kv_memories import Block, CopyUnderWay, Memories, StageStreams, Step, Token

NUM_DEVICE = 12
HANDLE = MemfdHandle(pid=1, fd=1, inode=1, size_bytes=1)


class KvWorld:
    """Nothing happens in it by itself: see `gpu_moves` and `able`."""

    def begin(
        self,
        num_stages: int,
        host_blocks: int,
        piece_blocks: int,
        depth: int,
        merging: bool,
        queued: bool,
    ) -> None:
        self.num_stages = num_stages
        self.block_bytes = [64 * (s + 1) for s in range(num_stages)]
        host_bytes = host_blocks * sum(self.block_bytes) + 63
        merge_runs = merge if merging else unmerged
        self.core = KvCore(
            num_stages, host_bytes, piece_blocks * 128, depth, merge_runs, orders_computing=queued
        )
        self.host_blocks = host_blocks
        self.queued = queued
        self.memories = Memories(num_stages, host_blocks, depth, queued=queued)
        self.gpus = [StageStreams(stage, self.memories) for stage in range(num_stages)]
        self.lives = [0] * num_stages
        self.stalled = 0
        """Looks at the devices before the next step moves: one may take long to end."""
        self.laid_out = False
        self.gone: set[Token] = set()
        """Dropped or released, ever."""
        self.requests: dict[int, list[Block]] = {}
        self.next_request = self.version = 0
        self.to_drop: list[tuple[int, int]] = []
        """(request, first index) lost in a reset."""
        self.expected_store: dict[int, Token] = {}
        """Device block → what its last Store says it holds."""
        self.epoch = -1
        self.steps: list[Step] = []
        self.first_step = 0
        self.begin_epoch(keep=True)
        self.feed(Reset(epoch=self.epoch))
        for stage in range(num_stages):
            self.attach_stage(stage)

    def begin_epoch(self, keep: bool) -> None:
        self.epoch += 1
        self.first_step += len(self.steps)
        self.steps = []
        self.computed = [self.first_step - 1] * self.num_stages
        self.loaded: list[dict[int, int]] = [{} for _ in range(self.num_stages)]
        """Step → number of its last copy."""
        self.prefetches: dict[int, dict[int, Token]] = {}
        self.last_use = dict.fromkeys(range(NUM_DEVICE), -1)
        self.free = set(range(NUM_DEVICE))
        self.releasing: dict[int, list[Block]] = {}
        self.released_copies: dict[int, list[CopyUnderWay]] = {}
        self.attached: set[int] = set()
        self.daemon_ready = False
        if not keep:
            self.to_drop.clear()
        for request, blocks in list(self.requests.items()):
            kept = []
            for block in blocks:
                if not (keep and block.stored):
                    break
                block.device = None
                kept.append(block)
            if keep and len(kept) < len(blocks):
                # What was stored beyond the first lost block is of no use: dropped once ready.
                self.to_drop.append((request, len(kept)))
            self.requests[request] = kept

    def feed(self, event: Event) -> None:
        commands = self.core.handle(event, 0.0)
        self.core.check_invariants()
        for command in commands:
            self.obey(command)

    def obey(self, command: Command) -> None:
        match command:
            case MapPool():
                self.feed(PoolMapped(command.offer))
            case LayOutHost():
                assert not self.laid_out
                self.laid_out = True
                assert command.num_blocks == self.host_blocks
                assert command.block_bytes == tuple(self.block_bytes)
            case StartCopy():
                assert command.stage in self.attached
                self.memories.start(command, self.expected_store)
            case SendToStage(message=PoolAttached() as message):
                assert message.epoch == self.epoch
                self.attached.add(command.stage)
            case SendToStage(message=Loaded() as message):
                self.on_loaded(command.stage, message)
            case SendToCoordinator(message=message):
                assert message.epoch == self.epoch
                self.on_answer(message)

    def on_loaded(self, stage: int, message: Loaded) -> None:
        assert message.epoch == self.epoch
        assert message.step not in self.loaded[stage], "Loaded twice"
        self.loaded[stage][message.step] = message.copy
        if self.queued:
            return  # the step looks when it runs
        assert message.copy == -1
        for device_block, token in self.prefetches[message.step].items():
            if token not in self.gone:
                assert self.memories.device[stage][device_block] == token

    def on_answer(self, message: ResetDone | Stored | Released) -> None:
        if isinstance(message, ResetDone):
            assert not self.daemon_ready
            assert self.attached == set(range(self.num_stages))
            assert not self.memories.copies
            assert message.num_host_blocks == self.host_blocks
            self.daemon_ready = True
            self.drop_what_was_lost()
            assert self.core.host_blocks_used == self.host_used
            return
        if isinstance(message, Released):
            for request in message.requests:
                for copy in self.memories.copies:
                    assert copy not in self.released_copies[request]
                for block in self.releasing.pop(request):
                    self.give_up_device(block)
            return
        for request, index in zip(message.requests, message.indices, strict=True):
            block = self.requests[request][index]
            assert block.store_sent
            block.stored = True

    @property
    def ready(self) -> bool:
        """The daemon has answered the reset, and so have the stages: their old steps are over."""
        return self.daemon_ready and not any(self.old_steps(gpu) for gpu in self.gpus)

    def old_steps(self, gpu: StageStreams) -> bool:
        return any(step.epoch != self.epoch for step in gpu.steps)

    def give_up_device(self, block: Block) -> None:
        if block.device is not None:
            self.free.add(block.device)
            block.device = None

    @property
    def host_used(self) -> int:
        """As a coordinator counts: a Release frees when answered, a Drop at once."""
        held = [*self.requests.values(), *self.releasing.values()]
        return sum(block.store_sent for blocks in held for block in blocks)

    def plan(self) -> Step:
        step = Step(self.first_step + len(self.steps))
        self.steps.append(step)
        return step

    def send_store(self, blocks: list[Block]) -> None:
        moves = []
        for block in blocks:
            assert block.device is not None
            block.store_sent = True
            self.expected_store[block.device] = block.token
            moves.append(BlockMove(block.token[0], block.token[1], block.device))
        after = max(block.filled_by for block in blocks)
        self.feed(Store(epoch=self.epoch, after=after, blocks=tuple(moves)))

    def blocks(self) -> list[Block]:
        return [block for blocks in self.requests.values() for block in blocks]

    def attach_stage(self, stage: int) -> None:
        offer = AttachPool(
            epoch=self.epoch,
            stage=stage,
            incarnation=str(self.lives[stage]),
            handle=HANDLE,
            num_blocks=NUM_DEVICE,
            block_bytes=self.block_bytes[stage],
        )
        self.feed(FromStage(stage, offer))

    def drop_what_was_lost(self) -> None:
        while self.to_drop:
            request, first = self.to_drop.pop()
            self.feed(Drop(epoch=self.epoch, request=request, first_index=first))

    def can_compute(self, stage: int) -> bool:
        position = self.computed[stage] + 1 - self.first_step
        if not self.ready or position == len(self.steps):
            return False
        step = self.steps[position]
        if stage and self.computed[stage - 1] < step.step:
            return False
        return not step.wait_for_load or step.step in self.loaded[stage]

    def able(self) -> list[int]:
        return [stage for stage in range(self.num_stages) if self.can_compute(stage)]

    def compute_on(self, stage: int) -> None:
        self.computed[stage] += 1
        step = self.steps[self.computed[stage] - self.first_step]
        if self.queued:
            load = self.loaded[stage].get(step.step, -1) if step.wait_for_load else -1
            event = self.gpus[stage].launch(step.step, self.epoch, load, step.reads, step.fills)
            computed = Computed(epoch=self.epoch, step=step.step, event=event)
            self.feed(FromStage(stage, computed))
            return
        for device_block, token in step.reads.items():
            assert token in self.gone or self.memories.device[stage][device_block] == token
        self.memories.device[stage].update(step.fills)
        self.feed(FromStage(stage, Computed(epoch=self.epoch, step=step.step)))

    def finish_copy(self, copy: CopyUnderWay) -> None:
        self.memories.end(copy)
        self.feed(CopyDone(copy.command.stage, copy.command.direction))

    def gpu_moves(self) -> list[Callable[[], None]]:
        """What may happen next on the devices: copies and queued steps begin and end."""
        moves: list[Callable[[], None]] = []
        for copy in self.memories.may_end():
            gpu = self.gpus[copy.command.stage]
            if copy.begun:
                moves.append(partial(self.finish_copy, copy))
            elif gpu.may_begin_copy(copy):
                moves.append(partial(gpu.begin_copy, copy, self.gone))
        if self.stalled:
            self.stalled -= 1
            return moves
        for stage, gpu in enumerate(self.gpus):
            if gpu.steps and gpu.steps[0].begun:
                moves.append(gpu.end)
            elif gpu.may_begin() and self.rows_there(stage):
                moves.append(partial(gpu.begin, self.gone, self.epoch))
        return moves

    def rows_there(self, stage: int) -> bool:
        """The stage before has ended the step that this one is at, or will never."""
        step = self.gpus[stage].steps[0]
        if stage == 0 or step.epoch != self.epoch:
            return True
        return all(other.step > step.step for other in self.gpus[stage - 1].steps)
