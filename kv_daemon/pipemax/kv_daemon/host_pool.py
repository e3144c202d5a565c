"""The host pool: one anonymous shared segment, divided into a region per stage."""

import logging
import os
import threading
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipemax.kv_daemon.numa import run_on
from pipemax.proto.errors import ConfigError
from pipemax.proto.memory import MemfdHandle, SharedMemory
from pipemax.proto.sizes import format_size

Blocks = npt.NDArray[np.uint8]
"""`[num_blocks, block_bytes]`: blocks of one stage, on the host or on the device."""

PAGE_BYTES = 4096
PREFAULT_BYTES = 64 * 2**20
"""Pages are touched in portions of this size, between which `close` is heard."""
PREFAULT_THREADS = 4
LOOK_INTERVAL_S = 0.2

log = logging.getLogger(__name__)


class HostPool:
    """`size_bytes` of host memory, 0 for none.

    patience_s: how long it waits for memory to become available. Stages hold the pool of a daemon
        that died until they notice.

    Raises ConfigError when the machine does not have that much: a page that cannot be had would
    kill the process later, in the middle of a copy.
    """

    def __init__(self, size_bytes: int, patience_s: float = 0.0) -> None:
        available = _available_within(patience_s, size_bytes)
        if size_bytes > available:
            raise ConfigError(
                f"--kv-offloading-size {format_size(size_bytes)} is more than the "
                f"{format_size(available)} of memory available; ask for less"
            )
        self.size_bytes = size_bytes
        self._memory = SharedMemory.create("pipemax-host-kv", size_bytes) if size_bytes else None
        self._closing = threading.Event()

    @property
    def handle(self) -> MemfdHandle | None:
        """None without a pool."""
        return None if self._memory is None else self._memory.handle

    @property
    def address(self) -> int:
        """Of the first byte, in this process."""
        return int(self._whole().ctypes.data)

    def touch(self, begin: int, end: int, cpus: frozenset[int] | None = None) -> bool:
        """Touches every page of that range, in bytes, so that no copy pays for it later; from
        threads on `cpus` if given, so that the pages lie on those CPUs' memory node. Says whether
        all were touched: `close` ends it early. NumPy does it without the interpreter lock, on any
        kernel."""
        whole = self._whole()
        whole[begin : min(begin + 1, end)] = 0
        first_page = -(-begin // PAGE_BYTES) * PAGE_BYTES
        starts = iter(range(first_page, end, PREFAULT_BYTES))
        lock = threading.Lock()

        def touch() -> None:
            if cpus is not None:
                run_on(cpus)
            while not self._closing.is_set():
                with lock:
                    start = next(starts, None)
                if start is None:
                    return
                whole[start : min(start + PREFAULT_BYTES, end) : PAGE_BYTES] = 0

        threads = [
            threading.Thread(target=touch, name=f"prefault-{i}", daemon=True)
            for i in range(min(PREFAULT_THREADS, os.cpu_count() or 1))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return not self._closing.is_set()

    def regions(self, num_blocks: int, block_bytes: tuple[int, ...]) -> tuple[Blocks, ...]:
        """By stage, `[num_blocks, block_bytes[stage]]`. The views share the pool's memory."""
        used = num_blocks * sum(block_bytes)
        if used > self.size_bytes:
            raise ValueError(f"{used} bytes of blocks in a pool of {self.size_bytes}")
        regions = []
        start = 0
        whole = self._whole()
        for size in block_bytes:
            end = start + num_blocks * size
            regions.append(whole[start:end].reshape(num_blocks, size))
            start = end
        return tuple(regions)

    @property
    def closing(self) -> bool:
        """Long work on the pool should end."""
        return self._closing.is_set()

    def stop_touching(self) -> None:
        """`touch` returns soon. May be called from another thread."""
        self._closing.set()

    def close(self) -> None:
        """Gives the memory back once no view of it is left."""
        self._closing.set()
        if self._memory is not None:
            self._memory.close()

    def _whole(self) -> npt.NDArray[np.uint8]:
        if self._memory is None:
            return np.empty(0, np.uint8)
        return np.frombuffer(self._memory.buffer, np.uint8)


def available_memory_bytes(meminfo: Path = Path("/proc/meminfo")) -> int:
    """What the kernel says can be used without swapping (`MemAvailable`)."""
    return _meminfo("MemAvailable", meminfo)


def _meminfo(wanted: str, meminfo: Path) -> int:
    for line in meminfo.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == wanted:
            return int(value.split()[0]) * 1024
    raise ConfigError(f"{meminfo} has no {wanted}; PipeMax needs Linux 3.14 or newer")


def _available_within(patience_s: float, wanted_bytes: int) -> int:
    """Available memory, as soon as it is enough or the time is over. What this machine never has
    is not waited for."""
    available = available_memory_bytes()
    if available >= wanted_bytes or wanted_bytes > _meminfo("MemTotal", Path("/proc/meminfo")):
        return available
    give_up_s = time.monotonic() + patience_s
    if patience_s:
        log.warning(
            "%s of memory are available and %s wanted; waiting up to %.0f s for more",
            format_size(available),
            format_size(wanted_bytes),
            patience_s,
        )
    while available < wanted_bytes and time.monotonic() < give_up_s:
        time.sleep(LOOK_INTERVAL_S)
        available = available_memory_bytes()
    return available
