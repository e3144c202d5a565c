"""The daemon's core and one of its engines for GPUs, with stages whose steps run on simulated GPUs:
everything between a step and the host pool but the sockets.

Blocks hold tokens (numbers) in every byte. Steps are queued as soon as they are announced to have
what they need, and check what they read when they run; so a copy made too early or too late, or one
that a step did not wait for, shows as a wrong token, whatever the delays.
"""

import os
import select
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipemax.kv_daemon.core import KvCore
from pipemax.kv_daemon.cuda_engine import CudaEngine
from pipemax.kv_daemon.engine import HostLayout
from pipemax.kv_daemon.events import (
    Command,
    CopyDone,
    Event,
    FromStage,
    LayOutHost,
    MapPool,
    SendToCoordinator,
    SendToStage,
    StartCopy,
)
from pipemax.kv_daemon.host_pool import HostPool
from pipemax.kv_daemon.order_engine import OrderEngine
from pipemax.proto import cuda
from pipemax.proto.messages.kv import AttachPool, Computed, Loaded, PoolAttached
from pipemax.proto.messages.types import Message
from pipemax.stage_worker.devices.cuda.copies import (
    CudaKvEnd,
    DaemonCopies,
    DevicePool,
    StageCopies,
)
from pipemax.stage_worker.devices.cuda.host_region import HostRegions
from support.fake_cuda import FakeCudaProcess, FakeMachine

DEADLINE_S = 20.0


class GpuStage:
    """A stage's process: its pool, its end of the copies, and a stream that computes."""

    def __init__(
        self,
        machine: FakeMachine,
        run_dir: Path,
        index: int,
        copies: str,
        num_blocks: int,
        size: int,
    ) -> None:
        self.index = index
        self.process = FakeCudaProcess(machine)
        self.runtime = self.process.open_runtime(0)
        self.incarnation = os.urandom(4).hex()
        self.num_blocks, self.block_bytes = num_blocks, size
        self.pointer = self.runtime.allocate(num_blocks * size)
        self.blocks = self.runtime.array(self.pointer, num_blocks * size).reshape(num_blocks, size)
        self.compute = self.runtime.create_stream()
        pool = DevicePool(self.pointer, num_blocks, size)
        self.regions: HostRegions | None = None
        self.kv: CudaKvEnd
        if copies == "stage":
            self.regions = HostRegions(self.runtime, run_dir, index, chunk_bytes=4096)
            self.kv = StageCopies(self.runtime, pool, self.regions)
        else:
            self.kv = DaemonCopies(self.runtime, pool)
        self.loaded: dict[int, int] = {}
        self.wrong: list[str] = []

    def offer(self, epoch: int) -> AttachPool:
        offer = self.kv.offer()
        return AttachPool(
            epoch=epoch,
            stage=self.index,
            incarnation=self.incarnation,
            handle=offer.handle,
            cuda=offer.cuda,
            num_blocks=self.num_blocks,
            block_bytes=self.block_bytes,
        )

    def queue_step(
        self, load: int, reads: dict[int, int], fills: dict[int, int], takes_s: float = 0.0
    ) -> int:
        """A step behind load number `load`; device block → token. Returns its event."""
        self.kv.wait_loaded(self.compute, load)

        def run() -> None:
            for block, token in reads.items():
                if not (self.blocks[block] == token).all():
                    found = sorted(set(self.blocks[block].tolist()))
                    self.wrong.append(f"block {block}: {found} instead of {token}")
            time.sleep(takes_s)
            for block, token in fills.items():
                self.blocks[block] = token

        self.runtime.call(self.compute, run)
        return self.kv.record_computed(self.compute)

    def close(self) -> None:
        """As a stage that was asked to leave."""
        self.runtime.synchronize(self.compute)
        self.kv.close()
        if self.regions is not None:
            self.regions.close()
        self.runtime.free(self.pointer)
        del self.blocks
        self.process.close()

    def die(self) -> None:
        """As a stage that was killed. What the kernel would close is closed here."""
        del self.blocks
        self.process.die()
        if self.regions is not None:
            while self.regions._held:
                self.regions.release()
            self.regions.notify(None)
            self.regions.close()
        os.close(self.kv.fileno() or 0)


class KvOnGpu:
    """`copies`: whose streams, as in the configuration."""

    def __init__(
        self,
        copies: str,
        machine: FakeMachine,
        run_dir: Path,
        monkeypatch: pytest.MonkeyPatch,
        *,
        block_bytes: tuple[int, ...],
        num_host: int,
        num_device: int,
        piece_blocks: int = 2,
        depth: int = 2,
    ) -> None:
        self.copies, self._machine, self._run_dir = copies, machine, run_dir
        self._num_device = num_device
        self.block_bytes = block_bytes
        self.process = FakeCudaProcess(machine)
        monkeypatch.setattr(cuda, "open_runtime", self.process.open_runtime)
        self.layout = HostLayout(num_host, block_bytes)
        self.pool = HostPool(num_host * sum(block_bytes))
        self.host = self.pool.regions(num_host, block_bytes)
        self.engine: OrderEngine | CudaEngine
        if copies == "stage":
            self.engine = OrderEngine(self.layout, self.pool.handle)
        else:
            self.engine = CudaEngine(self.layout, (0,) * len(block_bytes), self.pool)
            for stage in range(len(block_bytes)):
                self.engine.pin(*self.layout.part(stage))
        self.core = KvCore(
            len(block_bytes),
            self.pool.size_bytes,
            piece_blocks * max(block_bytes),
            depth,
            orders_computing=True,
        )
        self.stages = [self._new_stage(index) for index in range(len(block_bytes))]
        self.gone: set[int] = set()
        """Stages that died and have no successor yet."""
        self.told: list[Message] = []
        """To the coordinator."""
        self.started: list[StartCopy] = []

    def kill(self, index: int) -> None:
        self.stages[index].die()
        self.gone.add(index)

    def restart(self, index: int) -> GpuStage:
        self.stages[index] = self._new_stage(index)
        self.gone.discard(index)
        return self.stages[index]

    @property
    def living(self) -> list[GpuStage]:
        return [stage for stage in self.stages if stage.index not in self.gone]

    def _new_stage(self, index: int) -> GpuStage:
        return GpuStage(
            self._machine,
            self._run_dir,
            index,
            self.copies,
            self._num_device,
            self.block_bytes[index],
        )

    def feed(self, event: Event) -> None:
        for command in self.core.handle(event, 0.0):
            self._obey(command)
        self.core.check_invariants()

    def turn(self) -> None:
        """What loops of the daemon and of stages do when they are woken."""
        fds = [self.engine.fileno(), *(stage.kv.fileno() or 0 for stage in self.living)]
        select.select(fds, [], [], 0.05)
        for stage in self.living:
            for ended in stage.kv.ended():
                self.engine.copy_ended(stage.index, ended)
        for index, direction in self.engine.completed():
            self.feed(CopyDone(index, direction))

    def until(self, condition: Callable[[], object]) -> None:
        give_up_s = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < give_up_s, "it never happens"
            self.turn()

    def computed(self, stage: GpuStage, step: int, event: int) -> None:
        self.feed(FromStage(stage.index, Computed(epoch=self.core.epoch, step=step, event=event)))

    def close(self) -> None:
        for stage in self.living:
            stage.close()
        self.engine.close()
        if self.process.gone:  # the engine leaves it to the end of the process
            os.close(self.engine.fileno())
        del self.host
        self.pool.close()
        self.process.close()

    def _obey(self, command: Command) -> None:
        match command:
            case StartCopy():
                self.started.append(command)
                order = self.engine.start(command)
                if order is not None and command.stage not in self.gone:
                    self.stages[command.stage].kv.order(order)
            case MapPool(offer):
                self.feed(self.engine.map_pool(offer))
            case LayOutHost():
                self.engine.lay_out(self.host)
            case SendToStage(stage) if stage in self.gone:
                pass
            case SendToStage(stage, PoolAttached() as message):
                self.stages[stage].kv.attach(message)
            case SendToStage(stage, Loaded(step=step, copy=copy)):
                self.stages[stage].loaded[step] = copy
            case SendToCoordinator(message):
                self.told.append(message)
