"""The KV daemon's core with stages that attach at once, for tests of one behaviour at a time."""

from pipemax.kv_daemon.core import KvCore
from pipemax.kv_daemon.events import (
    Command,
    CopyDone,
    Direction,
    Event,
    FromStage,
    MapPool,
    PoolMapped,
    Run,
    SendToCoordinator,
    SendToStage,
    StartCopy,
)
from pipemax.kv_daemon.stage_link import Merge
from pipemax.kv_daemon.transfers import merge
from pipemax.proto.memory import MemfdHandle
from pipemax.proto.messages.control import (
    BlockMove,
    Prefetch,
    Released,
    Reset,
    ResetDone,
    Store,
    Stored,
)
from pipemax.proto.messages.kv import AttachPool, Computed, Loaded

BLOCK_BYTES = 100
NUM_DEVICE = 1000


class Daemon:
    """A core whose stages have attached for epoch 1. Commands pile up in `said`."""

    def __init__(
        self,
        num_stages: int = 1,
        host_blocks: int = 100,
        piece_blocks: int = 8,
        depth: int = 1,
        merge_runs: Merge = merge,
    ) -> None:
        host_bytes = host_blocks * num_stages * BLOCK_BYTES
        piece_bytes = piece_blocks * BLOCK_BYTES
        self.core = KvCore(num_stages, host_bytes, piece_bytes, depth, merge_runs)
        self.said: list[Command] = []
        self.num_stages = num_stages
        self.begin(1)

    def begin(self, epoch: int, keep_host_blocks: bool = True) -> list[Command]:
        self.feed(Reset(epoch=epoch, keep_host_blocks=keep_host_blocks))
        for stage in range(self.num_stages):
            self.attach(stage, epoch)
        return self.take()

    def attach(self, stage: int, epoch: int, block_bytes: int = BLOCK_BYTES) -> None:
        self.feed(FromStage(stage, offer(stage, epoch, block_bytes)))

    def feed(self, event: Event) -> None:
        commands = self.core.handle(event, 0.0)
        self.core.check_invariants()
        for command in commands:
            self.said.append(command)
            if isinstance(command, MapPool):
                self.feed(PoolMapped(command.offer))

    def take(self) -> list[Command]:
        """What was said since the last call."""
        said, self.said = self.said, []
        return said

    def store(self, blocks: list[tuple[int, int, int]], after: int = -1) -> None:
        moves = tuple(BlockMove(*block) for block in blocks)
        self.feed(Store(epoch=self.core.epoch, after=after, blocks=moves))

    def prefetch(self, step: int, blocks: list[tuple[int, int, int]], after: int = -1) -> None:
        moves = tuple(BlockMove(*block) for block in blocks)
        self.feed(Prefetch(epoch=self.core.epoch, step=step, after=after, blocks=moves))

    def computed(self, step: int, stage: int = 0) -> None:
        self.feed(FromStage(stage, Computed(epoch=self.core.epoch, step=step)))

    def done(self, direction: Direction, stage: int = 0) -> None:
        self.feed(CopyDone(stage, direction))

    def stored(self, blocks: list[tuple[int, int, int]]) -> list[Run]:
        """Stores blocks to the end on one stage; returns the copies it took."""
        self.store(blocks)
        runs: list[Run] = []
        while self.core.stages[0].lanes["store"].running:
            for command in self.take():
                if isinstance(command, StartCopy):
                    runs += command.runs
            self.done("store")
        self.take()
        return runs


def offer(stage: int, epoch: int, block_bytes: int = BLOCK_BYTES) -> AttachPool:
    handle = MemfdHandle(pid=1, fd=1, inode=1, size_bytes=1)
    return AttachPool(
        epoch=epoch, stage=stage, handle=handle, num_blocks=NUM_DEVICE, block_bytes=block_bytes
    )


def copies(commands: list[Command]) -> list[StartCopy]:
    return [command for command in commands if isinstance(command, StartCopy)]


def loaded(step: int, stage: int = 0, epoch: int = 1) -> SendToStage:
    return SendToStage(stage, Loaded(epoch=epoch, step=step))


def told(message: ResetDone | Stored | Released) -> SendToCoordinator:
    return SendToCoordinator(message)
