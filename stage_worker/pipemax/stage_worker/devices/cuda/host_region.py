"""A stage's part of the host pool, pinned in the background.

The stage asks for it when it starts, so that pages are pinned while weights load. It keeps the
region pinned until the daemon offers another one, or is gone: the memory of a daemon that died is
free for its successor only once no stage maps it.
"""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from mmap import PAGESIZE
from pathlib import Path

import numpy as np
import zmq

from pipemax.proto.cuda.pinned import CHUNK_BYTES, PinnedMemory, warn_of_memlock
from pipemax.proto.cuda.runtime import CudaRuntime
from pipemax.proto.errors import PipemaxSystemError, WireError
from pipemax.proto.memory import MemfdHandle, SharedMemory
from pipemax.proto.messages.kv import AskHostRegion, HostRegion, HostRegionHere
from pipemax.proto.messages.registry import KV
from pipemax.proto.rundir import socket_endpoint
from pipemax.proto.sizes import format_size
from pipemax.proto.sockets import connect_dealer, region_identity
from pipemax.proto.wire import Codec, encode, single_frame

ASK_INTERVAL_S = 2.0
"""The daemon may have been started again since the last time."""
LOOK_INTERVAL_S = 0.5
"""Between two looks whether the daemon is alive."""
JOIN_S = 10.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Pinned:
    """A region that the GPU copies from and to."""

    region: HostRegion
    memory: SharedMemory
    begin: int
    """Address of the region's first byte."""
    pages: PinnedMemory

    def pieces(self, offset_bytes: int, size_bytes: int) -> Iterator[tuple[int, int]]:
        """(address, size) of the copies that make up that range of the region, in order."""
        return self.pages.pieces(self.begin + offset_bytes, size_bytes)


class HostRegions:
    """Asks for the region, pins it, and gives it up; in a thread of its own.

    chunk_bytes: see PinnedMemory.
    """

    def __init__(
        self, runtime: CudaRuntime, run_dir: Path, stage: int, chunk_bytes: int = CHUNK_BYTES
    ) -> None:
        self._runtime = runtime
        self._endpoint = socket_endpoint(run_dir, "kv")
        self._stage = stage
        self._chunk_bytes = chunk_bytes
        self._changed = threading.Condition()
        self._answered = False
        """By HostRegionHere or PoolAttached, of a daemon that is not known to be gone."""
        self._target: HostRegion | None = None
        self._pinned: Pinned | None = None
        self._held = 0
        """Copies under way from or to the pinned region."""
        self._error: Exception | None = None
        self._wake_fd: int | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="host-region", daemon=True)
        self._thread.start()

    def wait_answered(self, timeout_s: float) -> bool:
        """Until the daemon has let go of what it mapped of this stage's predecessor: before that,
        free device memory is not all there is."""
        with self._changed:
            return self._changed.wait_for(lambda: self._answered, timeout_s)

    def offer(self, region: HostRegion | None) -> None:
        """The daemon says which region it is, or that there is none. Returns at once."""
        with self._changed:
            self._target = region
            self._answered = True
            self._changed.notify_all()

    @property
    def ready(self) -> bool:
        """The region offered last is pinned. Raises ConfigError when that failed."""
        with self._changed:
            if self._error is not None:
                raise self._error
            pinned = None if self._pinned is None else self._pinned.region
            return self._answered and pinned == self._target

    def hold(self, region: HostRegion) -> Pinned | None:
        """For a copy: the region stays pinned until `release`. None when it is not, or no more."""
        with self._changed:
            if self._pinned is None or self._pinned.region != region:
                return None
            self._held += 1
            return self._pinned

    def release(self) -> None:
        with self._changed:
            self._held -= 1
            self._changed.notify_all()

    def notify(self, wake_fd: int | None) -> None:
        """An eventfd to write when `ready` may have changed."""
        with self._changed:
            self._wake_fd = wake_fd

    def close(self) -> None:
        """Unpins, unless copies are under way: those die with the process."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(JOIN_S)

    # In the thread.

    def _run(self) -> None:
        try:
            with contextlib.closing(_Asking(self._endpoint, self._stage, self._runtime)) as asking:
                while not self._closing:
                    self._turn(asking)
        except Exception as error:  # raised where somebody can act on it
            with self._changed:
                self._error = error
                self._wake()
        finally:
            if self._held == 0:
                try:
                    self._unpin()
                except PipemaxSystemError as error:
                    log.warning("the host region is left to the end of this process: %s", error)

    def _turn(self, asking: "_Asking") -> None:
        """Waits for something to do, for LOOK_INTERVAL_S at most, and does it."""
        if self._answered:
            with self._changed:
                self._changed.wait_for(self._has_work, LOOK_INTERVAL_S)
        elif (answer := asking.answer(LOOK_INTERVAL_S)) is not None:
            with self._changed:
                if not self._answered:
                    self._target = answer.region
                    self._answered = True
                    self._changed.notify_all()
                    self._wake()
        self._forget_what_is_gone()
        self._pin_target()

    def _has_work(self) -> bool:
        pinned = None if self._pinned is None else self._pinned.region
        return self._closing or pinned != self._target

    def _forget_what_is_gone(self) -> None:
        """Asks for another region if the daemon of the present one is gone."""
        target = self._target
        if target is None or is_alive(target.handle):
            return
        with self._changed:
            if self._target == target:
                self._target = None
                self._answered = False

    def _pin_target(self) -> None:
        target = self._target
        if self._pinned is not None and self._pinned.region != target:
            with self._changed:
                idle = self._changed.wait_for(lambda: self._held == 0, LOOK_INTERVAL_S)
            if not idle:
                return
            self._unpin()
        if target is None or self._pinned is not None:
            return
        try:
            memory = SharedMemory.open(target.handle)
        except PipemaxSystemError:
            return  # gone in this moment: the next look sees it
        try:
            pinned = self._pin(target, memory)
        except BaseException:
            memory.close()
            raise
        with self._changed:
            self._pinned = pinned
            self._wake()

    def _pin(self, region: HostRegion, memory: SharedMemory) -> Pinned:
        size_bytes = region.num_blocks * region.block_bytes
        warn_of_memlock(size_bytes)
        started_s = time.monotonic()
        base = np.frombuffer(memory.buffer, np.uint8).ctypes.data
        begin = base + region.offset_bytes
        pages = PinnedMemory(self._runtime, self._chunk_bytes)
        pages.pin(begin - begin % PAGESIZE, begin + size_bytes, lambda: self._closing)
        seconds = time.monotonic() - started_s
        log.info("pinned %s of host memory in %.1f s", format_size(size_bytes), seconds)
        return Pinned(region, memory, begin, pages)

    def _unpin(self) -> None:
        with self._changed:
            pinned, self._pinned = self._pinned, None
        if pinned is not None:
            try:
                pinned.pages.unpin()
            finally:
                pinned.memory.close()

    def _wake(self) -> None:
        if self._wake_fd is not None:
            os.eventfd_write(self._wake_fd, 1)


class _Asking:
    """Asks the daemon for the region, again and again, on a socket of its own."""

    def __init__(self, endpoint: str, stage: int, runtime: CudaRuntime) -> None:
        self._question = AskHostRegion(stage=stage, pci_bus_id=runtime.properties().pci_bus_id)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = connect_dealer(self._context, endpoint, KV, region_identity(stage))
        self._codec = Codec(KV, at_binder=False)
        self._ask_at_s = 0.0

    def answer(self, timeout_s: float) -> HostRegionHere | None:
        """Asks if it is time to, and waits so long for an answer."""
        if time.monotonic() >= self._ask_at_s:
            self._ask_at_s = time.monotonic() + ASK_INTERVAL_S
            with contextlib.suppress(zmq.Again):
                self._socket.send(encode(self._question), zmq.NOBLOCK)
        if not self._socket.poll(int(timeout_s * 1e3)):
            return None
        try:
            message = self._codec.decode(single_frame(self._socket.recv_multipart(), KV))
        except WireError as error:
            log.warning("bad answer to the question for a host region: %s", error)
            return None
        return message if isinstance(message, HostRegionHere) else None

    def close(self) -> None:
        self._socket.close(linger=0)
        self._context.term()


def is_alive(handle: MemfdHandle) -> bool:
    """Whether the process that made this memory still holds it."""
    try:
        return os.stat(f"/proc/{handle.pid}/fd/{handle.fd}").st_ino == handle.inode
    except OSError:
        return False
