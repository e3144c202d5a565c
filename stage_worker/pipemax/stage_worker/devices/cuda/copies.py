"""The stage's end of KV copies on CUDA: who makes them, and how its steps are ordered behind them.

`StageCopies` carries the daemon's orders out on two streams of this process, between its device
pool and its pinned part of the host pool. `DaemonCopies` offers the pool to the daemon, which makes
the copies on streams of its own. In both, a step waits for its loads, and a copy for the steps
that come before it, on the device: no call here waits for the GPU.
"""

import contextlib
import logging
import os
import select
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np

from pipemax.proto.config import EngineConfig
from pipemax.proto.cuda.event_watcher import EventWatcher
from pipemax.proto.cuda.runtime import CudaEvent, CudaRuntime, Pointer, Stream
from pipemax.proto.errors import InvariantError, PipemaxSystemError, WireError
from pipemax.proto.messages.kv import (
    CopyEnded,
    CopyOrder,
    CudaPool,
    Direction,
    HostRegion,
    PoolAttached,
)
from pipemax.stage_worker.devices.cuda.host_region import HostRegions
from pipemax.stage_worker.devices.cuda.step_ring import RING, StepRing
from pipemax.stage_worker.kv_end import KvEnd, PoolOffer

log = logging.getLogger(__name__)

_DIRECTIONS: Final[tuple[Direction, Direction]] = ("load", "store")
CLOSE_S = 2.0
"""Longest that copies under way may take to end when the stage leaves."""


@dataclass(frozen=True, slots=True)
class DevicePool:
    """`[num_blocks, block_bytes]` on the stage's GPU."""

    pointer: Pointer
    num_blocks: int
    block_bytes: int


class CudaKvEnd(KvEnd, Protocol):
    """What the work loop needs to order steps and copies. Used from the loop's thread only.

    `attached` is true once the daemon has answered, the host region is pinned, and every step
    recorded before `detach` has ended: a copy of the new epoch meets no old kernel in a block. So
    each step that was launched must be recorded before messages are handled again.
    """

    def wait_loaded(self, stream: Stream, copy: int) -> None:
        """What is queued on `stream` from now on runs behind load `copy` (see Loaded.copy)."""

    def record_computed(self, stream: Stream) -> int:
        """Behind a step; returns the number for Computed.event."""

    def close(self) -> None:
        """Ends the threads and gives up what was made here; the pool is the caller's."""


@dataclass(frozen=True, slots=True)
class _Order:
    """A copy under way."""

    number: int
    num_bytes: int
    num_runs: int
    daemon: int
    """Which one ordered it: a stage may see several."""


class _Lane:
    """One direction: a stream, its copies under way and the events around each."""

    def __init__(self, runtime: CudaRuntime, direction: Direction, wake_fd: int) -> None:
        self._runtime = runtime
        self.direction: Direction = direction
        self.stream = runtime.create_stream()
        self._begin = tuple(runtime.create_event(timed=True) for _ in range(RING))
        self._end = tuple(runtime.create_event(timed=True) for _ in range(RING))
        self._watcher: EventWatcher[_Order] = EventWatcher(runtime, f"kv-{direction}", wake_fd)
        self.newest = self.ended = -1
        """Numbers of the present daemon's copies."""
        self.under_way = 0

    def begin(self, number: int) -> None:
        """Behind what the copy waits for, before its first byte."""
        if self.under_way >= RING:
            raise InvariantError(f"{self.under_way} copies under way in one direction")
        self._runtime.record(self._begin[number % RING], self.stream)

    def end(self, order: _Order) -> None:
        """Behind the last byte."""
        event = self._end[order.number % RING]
        self._runtime.record(event, self.stream)
        self.newest = order.number
        self.under_way += 1
        self._watcher.watch(event, order)

    def wait(self, stream: Stream, number: int) -> None:
        """`stream` waits for the end of that copy."""
        if number > self.newest:
            raise PipemaxSystemError(
                f"a step was told to wait for load {number}, which was never ordered or came from "
                "a daemon that is gone"
            )
        if number > max(self.ended, self.newest - RING):
            self._runtime.wait(stream, self._end[number % RING])

    def passed(self) -> list[_Order]:
        """What ended since the last call."""
        passed = self._watcher.passed()
        self.under_way -= len(passed)
        return passed

    def busy_s(self, order: _Order) -> float:
        """How long an ended copy took, without what it waited for."""
        slot = order.number % RING
        return self._runtime.elapsed_s(self._begin[slot], self._end[slot])

    def forget_numbers(self) -> None:
        """Another daemon counts anew."""
        self.newest = self.ended = -1

    def close(self) -> None:
        self._watcher.close()
        for event in (*self._begin, *self._end):
            self._runtime.destroy_event(event)
        self._runtime.destroy_stream(self.stream)


class StageCopies:
    """CudaKvEnd of a stage that makes its copies itself, as the daemon orders them.

    regions: keeps the stage's part of the host pool pinned; closed by the caller, after this.
    """

    def __init__(self, runtime: CudaRuntime, pool: DevicePool, regions: HostRegions) -> None:
        self._runtime = runtime
        self._pool = pool
        self._regions = regions
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._computed = StepRing(runtime, interprocess=False)
        self._lanes = {
            direction: _Lane(runtime, direction, self._wake_fd) for direction in _DIRECTIONS
        }
        self._drain: EventWatcher[None] = EventWatcher(runtime, "kv-drain", self._wake_fd)
        self._region: HostRegion | None = None
        self._daemon = 0
        self._answered = False
        regions.notify(self._wake_fd)

    def offer(self) -> PoolOffer:
        return PoolOffer()

    def attach(self, answer: PoolAttached) -> None:
        if answer.region != self._region:
            self._region = answer.region
            self._daemon += 1
            for lane in self._lanes.values():
                lane.forget_numbers()
        self._regions.offer(answer.region)
        self._answered = True

    @property
    def attached(self) -> bool:
        return (
            self._answered
            and self._computed.drained
            and self._regions.ready
            and not any(lane.under_way for lane in self._lanes.values())
        )

    def detach(self) -> None:
        self._answered = False
        self._computed.begin_drain()
        if self._computed.latest is not None:
            self._drain.watch(self._computed.latest, None)

    def order(self, order: CopyOrder) -> None:
        """Raises WireError for blocks that do not exist. An order for the process that had this
        stage's name before, or from a daemon that is gone, is nobody's any more."""
        if self._region is None:
            return
        lane = self._lanes[order.direction]
        copies = _copies(order, self._region, self._pool)
        pinned = self._regions.hold(self._region)
        if pinned is None:
            return
        self._computed.wait(lane.stream, order.after)
        lane.begin(order.number)
        num_bytes = 0
        for host_offset, device_offset, size_bytes in copies:
            num_bytes += size_bytes
            device = self._pool.pointer + device_offset
            for host, size in pinned.pieces(host_offset, size_bytes):
                target, source = (device, host) if order.direction == "load" else (host, device)
                self._runtime.copy(target, source, size, lane.stream)
                device += size
        lane.end(_Order(order.number, num_bytes, len(copies), self._daemon))

    def fileno(self) -> int:
        return self._wake_fd

    def ended(self) -> Sequence[CopyEnded]:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake_fd)
        self._drain.passed()
        return [ended for lane in self._lanes.values() if (ended := self._ended(lane)) is not None]

    def wait_loaded(self, stream: Stream, copy: int) -> None:
        if copy >= 0:
            self._lanes["load"].wait(stream, copy)

    def record_computed(self, stream: Stream) -> int:
        return self._computed.record(stream)

    def close(self) -> None:
        self._let_copies_end()
        self._drain.close()
        for lane in self._lanes.values():
            lane.close()
        self._computed.close()
        self._regions.notify(None)
        os.close(self._wake_fd)

    def _let_copies_end(self) -> None:
        """Those that can: one that waits for what never comes dies with the process."""
        give_up_s = time.monotonic() + CLOSE_S
        while any(lane.under_way for lane in self._lanes.values()):
            if not select.select([self._wake_fd], [], [], max(0.0, give_up_s - time.monotonic()))[
                0
            ]:
                return
            self.ended()

    def _ended(self, lane: _Lane) -> CopyEnded | None:
        """All that ended since the last call, if the present daemon ordered it."""
        orders = lane.passed()
        for _ in orders:
            self._regions.release()
        orders = [order for order in orders if order.daemon == self._daemon]
        if not orders:
            return None
        lane.ended = orders[-1].number
        return CopyEnded(
            number=lane.ended,
            direction=lane.direction,
            bytes=sum(order.num_bytes for order in orders),
            copies=sum(order.num_runs for order in orders),
            busy_s=sum(map(lane.busy_s, orders)),
        )


class DaemonCopies:
    """CudaKvEnd of a stage whose copies the daemon makes."""

    def __init__(self, runtime: CudaRuntime, pool: DevicePool) -> None:
        self._runtime = runtime
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._computed = StepRing(runtime, interprocess=True)
        self._drain: EventWatcher[None] = EventWatcher(runtime, "kv-drain", self._wake_fd)
        self._cuda = CudaPool(
            memory=runtime.export_memory(pool.pointer),
            pid=os.getpid(),
            pci_bus_id=runtime.properties().pci_bus_id,
            computed=tuple(map(runtime.export_event, self._computed.events)),
        )
        self._handles: tuple[bytes, ...] = ()
        self._loaded: tuple[CudaEvent, ...] = ()
        self._answered = False

    def offer(self) -> PoolOffer:
        return PoolOffer(cuda=self._cuda)

    def attach(self, answer: PoolAttached) -> None:
        """Of a daemon that is gone again, its successor will answer."""
        if answer.loaded != self._handles:
            self._forget_loaded()
            try:
                for handle in answer.loaded:
                    self._loaded += (self._runtime.open_event(handle),)
            except PipemaxSystemError as error:
                log.warning("the daemon's events are gone: %s", error)
                self._forget_loaded()
                return
            self._handles = answer.loaded
        self._answered = True

    @property
    def attached(self) -> bool:
        return self._answered and self._computed.drained

    def detach(self) -> None:
        self._answered = False
        self._computed.begin_drain()
        if self._computed.latest is not None:
            self._drain.watch(self._computed.latest, None)

    def order(self, order: CopyOrder) -> None:
        raise WireError("unexpected", "a copy_order for a stage whose copies the daemon makes")

    def fileno(self) -> int:
        return self._wake_fd

    def ended(self) -> Sequence[CopyEnded]:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake_fd)
        self._drain.passed()
        return ()

    def wait_loaded(self, stream: Stream, copy: int) -> None:
        """A copy whose number has fallen out of the ring has passed; then this waits for a later
        one on the same event, which the daemon has queued as well."""
        if copy < 0:
            return
        if not self._loaded:
            raise PipemaxSystemError("a load was announced by a daemon that has not attached")
        self._runtime.wait(stream, self._loaded[copy % len(self._loaded)])

    def record_computed(self, stream: Stream) -> int:
        return self._computed.record(stream)

    def close(self) -> None:
        self._drain.close()
        self._forget_loaded()
        self._computed.close()
        os.close(self._wake_fd)

    def _forget_loaded(self) -> None:
        for event in self._loaded:
            self._runtime.destroy_event(event)
        self._loaded = self._handles = ()


def open_kv_end(
    config: EngineConfig, runtime: CudaRuntime, pool: DevicePool, regions: HostRegions
) -> CudaKvEnd:
    """As `config.cuda.kv_copies` says."""
    assert config.cuda is not None
    if config.cuda.kv_copies == "daemon":
        return DaemonCopies(runtime, pool)
    return StageCopies(runtime, pool, regions)


def _copies(order: CopyOrder, region: HostRegion, pool: DevicePool) -> list[tuple[int, int, int]]:
    """(offset in the region, offset in the pool, size) of each run, in bytes."""
    runs = np.frombuffer(order.runs, "<i4")
    if not runs.size or runs.size % 3:
        raise WireError("invalid", f"a copy_order of {runs.size} numbers, not three a run")
    host, device, length = runs.reshape(-1, 3).astype(np.int64).T
    if (
        min(host.min(), device.min(), length.min() - 1) < 0
        or (host + length).max() > region.num_blocks
        or (device + length).max() > pool.num_blocks
    ):
        raise WireError("invalid", f"{order.direction} {order.number} names blocks that are not")
    size = pool.block_bytes
    return list(
        zip(*(a.tolist() for a in (host * size, device * size, length * size)), strict=True)
    )
