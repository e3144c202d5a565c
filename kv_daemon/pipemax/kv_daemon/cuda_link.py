"""One stage's GPU as the daemon's copies see it: streams, events, and the pool while it is mapped.

A link belongs to one process of the stage. When that is gone, what waits for its events may wait
for ever: the link retires with its streams, and the stage's next process gets another one.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass

from pipemax.kv_daemon.events import DIRECTIONS, Direction, Run, StartCopy
from pipemax.proto.cuda.event_watcher import EventWatcher
from pipemax.proto.cuda.pinned import PinnedMemory
from pipemax.proto.cuda.runtime import CudaEvent, CudaRuntime, Stream
from pipemax.proto.errors import InvariantError, PipemaxSystemError
from pipemax.proto.messages.kv import AttachPool

RING = 64
"""Events of each kind. Number n is recorded on the event at n modulo this."""


@dataclass(frozen=True, slots=True)
class HostPart:
    """A stage's region of the host pool, and the pages it lies in."""

    begin: int
    """Address of the first byte."""
    num_blocks: int
    block_bytes: int
    pages: PinnedMemory


@dataclass(frozen=True, slots=True)
class EndedCopy:
    direction: Direction
    num_bytes: int
    num_runs: int
    busy_s: float


@dataclass(frozen=True, slots=True)
class _UnderWay:
    number: int
    num_bytes: int
    num_runs: int


class _Lane:
    """One direction: a stream and the events around its copies."""

    def __init__(self, runtime: CudaRuntime, name: str, wake_fd: int) -> None:
        self._runtime = runtime
        self.stream: Stream = runtime.create_stream()
        self.begin = tuple(runtime.create_event(timed=True) for _ in range(RING))
        self.end = tuple(runtime.create_event(timed=True) for _ in range(RING))
        self.watcher: EventWatcher[_UnderWay] = EventWatcher(runtime, name, wake_fd)
        self.under_way = 0

    def close(self) -> None:
        self.watcher.close()
        for event in (*self.begin, *self.end):
            self._runtime.destroy_event(event)
        self._runtime.destroy_stream(self.stream)


class CudaLink:
    """Copies of one stage. Raises PipemaxSystemError when the pool or its events are gone, or are
    not as offered."""

    def __init__(
        self, runtime: CudaRuntime, offer: AttachPool, host: HostPart, wake_fd: int
    ) -> None:
        assert offer.cuda is not None
        if not offer.cuda.computed:
            raise PipemaxSystemError(f"stage {offer.stage} offers a pool without events")
        self.incarnation = offer.incarnation
        self._stage = offer.stage
        self._pid = offer.cuda.pid
        self._num_blocks = offer.num_blocks
        self._block_bytes = offer.block_bytes
        self._host = host
        self._runtime = runtime
        self._undo: list[Callable[[], None]] = []
        try:
            self._open(offer, wake_fd)
        except BaseException:
            self.close()
            raise

    def _open(self, offer: AttachPool, wake_fd: int) -> None:
        assert offer.cuda is not None
        runtime = self._runtime
        pool = runtime.open_memory(offer.cuda.memory)
        self._undo.append(lambda: runtime.close_memory(pool))
        self._pool = pool
        self._computed = tuple(self._own(runtime.open_event(h)) for h in offer.cuda.computed)
        self._loaded = tuple(
            self._own(runtime.create_event(interprocess=True)) for _ in range(RING)
        )
        self.loaded_handles = tuple(map(runtime.export_event, self._loaded))
        self._lanes: dict[Direction, _Lane] = {}
        for direction in DIRECTIONS:
            lane = _Lane(runtime, f"{direction}-{offer.stage}", wake_fd)
            self._undo.append(lane.close)
            self._lanes[direction] = lane

    def _own(self, event: CudaEvent) -> CudaEvent:
        self._undo.append(lambda: self._runtime.destroy_event(event))
        return event

    @property
    def num_under_way(self) -> int:
        return sum(lane.under_way for lane in self._lanes.values())

    @property
    def is_alive(self) -> bool:
        """The stage's process is there, and whole."""
        return is_running(self._pid)

    def start(self, copy: StartCopy) -> None:
        """Queues a copy; never blocks."""
        for run in copy.runs:
            self._check(copy, run)
        lane = self._lanes[copy.direction]
        if lane.under_way >= RING:
            raise InvariantError(f"{lane.under_way} copies under way in one direction")
        slot = copy.number % RING
        if copy.after >= 0:
            # One too old for the ring has passed, and what is recorded there now is queued.
            self._runtime.wait(lane.stream, self._computed[copy.after % len(self._computed)])
        self._runtime.record(lane.begin[slot], lane.stream)
        num_bytes = sum(self._copy_run(copy.direction, lane.stream, run) for run in copy.runs)
        self._runtime.record(lane.end[slot], lane.stream)
        if copy.direction == "load":
            self._runtime.record(self._loaded[slot], lane.stream)
        lane.under_way += 1
        lane.watcher.watch(lane.end[slot], _UnderWay(copy.number, num_bytes, len(copy.runs)))

    def passed(self) -> list[EndedCopy]:
        """Copies that ended since the last call, by direction in order. Stores that ended when the
        stage had died are left out: what they waited for may never have been computed. So they end
        like all that did not (see CudaEngine)."""
        ended: list[EndedCopy] = []
        for direction, lane in self._lanes.items():
            copies = lane.watcher.passed()
            lane.under_way -= len(copies)
            if copies and direction == "store" and not self.is_alive:
                continue
            for copy in copies:
                slot = copy.number % RING
                busy_s = self._runtime.elapsed_s(lane.begin[slot], lane.end[slot])
                ended.append(EndedCopy(direction, copy.num_bytes, copy.num_runs, busy_s))
        return ended

    def close(self) -> None:
        """Once no copy is under way, or at the end of the process. Safe to call twice."""
        while self._undo:
            self._undo.pop()()

    def _copy_run(self, direction: Direction, stream: Stream, run: Run) -> int:
        size_bytes = run.length * self._block_bytes
        device = self._pool + run.device_block * self._block_bytes
        first = self._host.begin + run.host_block * self._block_bytes
        for host, size in self._host.pages.pieces(first, size_bytes):
            target, source = (device, host) if direction == "load" else (host, device)
            self._runtime.copy(target, source, size, stream)
            device += size
        return size_bytes

    def _check(self, copy: StartCopy, run: Run) -> None:
        host, device, length = run
        if (
            min(host, device) < 0
            or host + length > self._host.num_blocks
            or device + length > self._num_blocks
        ):
            raise InvariantError(
                f"stage {self._stage}: {copy.direction} of blocks that do not exist"
            )


def is_running(pid: int) -> bool:
    """False as soon as the process has begun to fall apart: it loses its program before its GPU."""
    try:
        os.readlink(f"/proc/{pid}/exe")
    except OSError:
        return False
    return True
