"""Copies on the CPU: one thread per stage and direction, NumPy without the interpreter lock."""

import os
import threading
import time
import traceback
from collections import deque
from queue import SimpleQueue

import numpy as np

from pipemax.kv_daemon.events import DIRECTIONS, Direction, PoolMapped, StartCopy
from pipemax.kv_daemon.host_pool import Blocks
from pipemax.kv_daemon.pacing import LinkPacer
from pipemax.proto.errors import InvariantError, PipemaxSystemError, WireError
from pipemax.proto.memory import SharedMemory
from pipemax.proto.messages.control import LinkTotals
from pipemax.proto.messages.kv import AttachPool, CopyEnded

Work = tuple[Blocks, Blocks, list[tuple[int, int, int]], int]
"""Source, target, (source block, target block, length) of each run, and a block's bytes on the
link."""


class CpuEngine:
    """CopyEngine for device pools in shared memory.

    bandwidth_bytes_s: each stage's link carries this much in each direction; None does not limit.
    held_block_bytes: stages that only model their KV hold so little per block, whatever it takes on
    the link; None: a block is what it takes.
    """

    def __init__(
        self,
        num_stages: int,
        bandwidth_bytes_s: float | None,
        held_block_bytes: int | None = None,
    ) -> None:
        self._held_block_bytes = held_block_bytes
        self._link_block_bytes = [0] * num_stages
        self._pools: list[SharedMemory | None] = [None] * num_stages
        self._device: list[Blocks | None] = [None] * num_stages
        self._host: tuple[Blocks, ...] = ()
        self._event_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._done: deque[tuple[int, Direction, Exception | None]] = deque()
        self._stop = threading.Event()
        self._lanes = {
            (stage, direction): _CopyThread(stage, direction, bandwidth_bytes_s, self)
            for stage in range(num_stages)
            for direction in DIRECTIONS
        }

    def fileno(self) -> int:
        return self._event_fd

    orders_computing = False

    def map_pool(self, offer: AttachPool) -> PoolMapped:
        if offer.handle is None:
            raise PipemaxSystemError(f"stage {offer.stage} offers no pool in shared memory")
        (held_bytes,) = self.held_bytes((offer.block_bytes,))
        needed = offer.num_blocks * held_bytes
        if not 0 < needed <= offer.handle.size_bytes:
            raise PipemaxSystemError(
                f"stage {offer.stage} offers {offer.num_blocks} blocks of {held_bytes} "
                f"bytes in a segment of {offer.handle.size_bytes} bytes"
            )
        memory = SharedMemory.open(offer.handle)
        blocks = np.frombuffer(memory.buffer, np.uint8)[:needed]
        self._unmap(offer.stage)
        self._pools[offer.stage] = memory
        self._device[offer.stage] = blocks.reshape(offer.num_blocks, held_bytes)
        self._link_block_bytes[offer.stage] = offer.block_bytes
        return PoolMapped(offer)

    def region(self, stage: int) -> None:
        return None

    def let_go(self, stage: int) -> bool:
        """Shared memory costs nobody anything until its successor attaches."""
        return True

    def held_bytes(self, block_bytes: tuple[int, ...]) -> tuple[int, ...]:
        held = self._held_block_bytes
        return block_bytes if held is None else (held,) * len(block_bytes)

    def lay_out(self, regions: tuple[Blocks, ...]) -> None:
        self._host = regions

    def start(self, copy: StartCopy) -> None:
        stage, direction, runs = copy.stage, copy.direction, copy.runs
        host, device = self._host[stage], self._device[stage]
        if device is None:
            raise PipemaxSystemError(f"a copy was started before stage {stage} offered its pool")
        for h, d, length in runs:
            if h < 0 or d < 0 or h + length > len(host) or d + length > len(device):
                raise InvariantError(f"stage {stage}: {direction} of blocks that do not exist")
        size = self._link_block_bytes[stage]
        if direction == "load":
            work = (host, device, [(h, d, length) for h, d, length in runs], size)
        else:
            work = (device, host, [(d, h, length) for h, d, length in runs], size)
        self._lanes[stage, direction].queue.put(work)

    def copy_ended(self, stage: int, message: CopyEnded) -> None:
        raise WireError("unexpected", f"a copy_ended of stage {stage}, which makes no copies")

    def completed(self) -> list[tuple[int, Direction]]:
        try:
            os.eventfd_read(self._event_fd)
        except BlockingIOError:
            return []
        ended: list[tuple[int, Direction]] = []
        while self._done:
            stage, direction, error = self._done.popleft()
            if error is not None:
                raise error
            ended.append((stage, direction))
        return ended

    def totals(self) -> tuple[LinkTotals, ...]:
        totals = []
        for stage in range(len(self._pools)):
            load_bytes, load_seconds, load_copies = self._lanes[stage, "load"].totals
            store_bytes, store_seconds, store_copies = self._lanes[stage, "store"].totals
            totals.append(
                LinkTotals(
                    load_bytes=load_bytes,
                    load_seconds=load_seconds,
                    load_copies=load_copies,
                    store_bytes=store_bytes,
                    store_seconds=store_seconds,
                    store_copies=store_copies,
                )
            )
        return tuple(totals)

    def close(self) -> None:
        """Safe to call twice."""
        if self._stop.is_set():
            return
        self._stop.set()
        for lane in self._lanes.values():
            lane.queue.put(None)
        for lane in self._lanes.values():
            lane.thread.join()
        self._host = ()
        for stage in range(len(self._pools)):
            self._unmap(stage)
        os.close(self._event_fd)

    def signal(self, stage: int, direction: Direction, error: Exception | None) -> None:
        """From a copy thread: a copy ended."""
        self._done.append((stage, direction, error))
        os.eventfd_write(self._event_fd, 1)

    def sleep_until(self, deadline: float) -> None:
        """From a copy thread; returns early when the engine closes."""
        remaining = deadline - time.perf_counter()
        if remaining > 0:
            self._stop.wait(remaining)

    def _unmap(self, stage: int) -> None:
        """The mapping itself lives until the last copy under way drops its view of it."""
        memory = self._pools[stage]
        self._device[stage] = self._pools[stage] = None
        if memory is not None:
            memory.close()


class _CopyThread:
    """One direction of one stage's link."""

    def __init__(
        self, stage: int, direction: Direction, bandwidth_bytes_s: float | None, engine: CpuEngine
    ) -> None:
        self.queue: SimpleQueue[Work | None] = SimpleQueue()
        self.totals = (0, 0.0, 0)
        """(bytes, seconds, copies); replaced as a whole, so that readers need no lock."""
        self._stage = stage
        self._direction = direction
        self._engine = engine
        self._pacer = LinkPacer(bandwidth_bytes_s)
        self.thread = threading.Thread(
            target=self._run, name=f"copy-{direction}-{stage}", daemon=True
        )
        self.thread.start()

    def _run(self) -> None:
        while self._carry_out(self.queue.get()):
            pass

    def _carry_out(self, work: Work | None) -> bool:
        """False when told to stop. A frame of its own, so that a waiting thread holds no view of
        a pool that is to be unmapped."""
        if work is None:
            return False
        error: Exception | None = None
        try:
            self._copy(*work)
        except Exception as raised:  # handed to the caller's thread
            traceback.clear_frames(raised.__traceback__)  # which must not keep pools mapped
            work = None
            error = raised
        self._engine.signal(self._stage, self._direction, error)
        return True

    def _copy(
        self, source: Blocks, target: Blocks, runs: list[tuple[int, int, int]], block_bytes: int
    ) -> None:
        num_bytes = sum(length for _, _, length in runs) * block_bytes
        begin, deadline = self._pacer.begin(time.perf_counter(), num_bytes)
        for s, t, length in runs:
            if length == 1:  # two views fewer to make: 3 % of a block of 100 KiB
                target[t] = source[s]
            else:
                target[t : t + length] = source[s : s + length]
        self._pacer.end(begin, deadline, time.perf_counter())
        self._engine.sleep_until(deadline)
        total_bytes, _, copies = self.totals
        self.totals = (total_bytes + num_bytes, self._pacer.busy_s, copies + len(runs))
