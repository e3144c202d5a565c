"""The host pool: one anonymous shared segment, divided into a region per stage."""

import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipemax.proto.errors import ConfigError
from pipemax.proto.memory import SharedMemory
from pipemax.proto.sizes import format_size

Blocks = npt.NDArray[np.uint8]
"""`[num_blocks, block_bytes]`: blocks of one stage, on the host or on the device."""

PAGE_BYTES = 4096
PREFAULT_BYTES = 64 * 2**20
"""Pages are touched in portions of this size, between which `close` is heard."""
PREFAULT_THREADS = 4

log = logging.getLogger(__name__)


class HostPool:
    """`size_bytes` of host memory, 0 for none.

    Raises ConfigError when the machine does not have that much: a page that cannot be had would
    kill the process later, in the middle of a copy.
    """

    def __init__(self, size_bytes: int) -> None:
        available = available_memory_bytes()
        if size_bytes > available:
            raise ConfigError(
                f"--kv-offloading-size {format_size(size_bytes)} is more than the "
                f"{format_size(available)} of memory available; ask for less"
            )
        self.size_bytes = size_bytes
        self._memory = SharedMemory.create("pipemax-host-kv", size_bytes) if size_bytes else None
        self._closing = threading.Event()
        self._prefault: threading.Thread | None = None

    def start_prefault(self, on_done: Callable[[], None]) -> None:
        """Touches every page in the background, so that no copy pays for it later, then calls
        `on_done` from another thread."""
        self._prefault = threading.Thread(
            target=self._touch_all, args=(on_done,), name="prefault", daemon=True
        )
        self._prefault.start()

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

    def close(self) -> None:
        """Gives the memory back once no view of it is left."""
        self._closing.set()
        if self._prefault is not None:
            self._prefault.join()
        if self._memory is not None:
            self._memory.close()

    def _whole(self) -> npt.NDArray[np.uint8]:
        if self._memory is None:
            return np.empty(0, np.uint8)
        return np.frombuffer(self._memory.buffer, np.uint8)

    def _touch_all(self, on_done: Callable[[], None]) -> None:
        """Writes one byte per page. NumPy does it without the interpreter lock, on any kernel."""
        whole = self._whole()
        starts = iter(range(0, self.size_bytes, PREFAULT_BYTES))
        lock = threading.Lock()

        def touch() -> None:
            while not self._closing.is_set():
                with lock:
                    start = next(starts, None)
                if start is None:
                    return
                whole[start : start + PREFAULT_BYTES : PAGE_BYTES] = 0

        helpers = [
            threading.Thread(target=touch, name=f"prefault-{i}", daemon=True)
            for i in range(min(PREFAULT_THREADS, os.cpu_count() or 1) - 1)
        ]
        for helper in helpers:
            helper.start()
        touch()
        for helper in helpers:
            helper.join()
        if not self._closing.is_set():
            on_done()


def available_memory_bytes(meminfo: Path = Path("/proc/meminfo")) -> int:
    """What the kernel says can be used without swapping (`MemAvailable`)."""
    for line in meminfo.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    raise ConfigError(f"{meminfo} has no MemAvailable; PipeMax needs Linux 3.14 or newer")
