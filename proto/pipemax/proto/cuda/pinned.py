"""Host memory that a GPU copies from and to: pinning it, and what may go wrong with that."""

import logging
import resource
from bisect import bisect_right
from collections.abc import Callable, Iterator
from mmap import PAGESIZE

from pipemax.proto.cuda.runtime import CudaRuntime
from pipemax.proto.errors import ConfigError, PipemaxSystemError
from pipemax.proto.sizes import format_size

CHUNK_BYTES = 2**30
"""Registered at once. Between chunks a stop is heard. By one thread: the driver takes one range
after the other, and the pages are there already."""
COPY_BYTES = 8 * 2**20
"""Most bytes of one copy. What is more urgent on the same link, above all activations on cards
without peer access, waits for the copy that runs: 0.3 ms at 25 GB/s. Smaller ones would lose more
to the microseconds between two copies than they gain."""

_REMEDY = "raise it with `ulimit -l unlimited`, in a service unit with LimitMEMLOCK=infinity"

log = logging.getLogger(__name__)


class PinnedMemory:
    """Registered parts of one mapping. `pin` and `unpin` are for one thread, `pieces` for any.

    chunk_bytes: see CHUNK_BYTES; a multiple of the page size.
    """

    def __init__(self, runtime: CudaRuntime, chunk_bytes: int = CHUNK_BYTES) -> None:
        self._runtime = runtime
        self._chunk_bytes = chunk_bytes
        self._chunks: tuple[tuple[int, int], ...] = ()
        """(address, size), in order; replaced as a whole, so that readers need no lock."""

    def pin(self, begin: int, end: int, stopped: Callable[[], bool]) -> None:
        """Registers whole pages from `begin`, where one begins, to the one that `end` lies in. None
        may be registered already. Returns early when `stopped`. Raises ConfigError with the
        remedy."""
        end = next_page(end)
        chunks: list[tuple[int, int]] = []
        for address in range(begin, end, self._chunk_bytes):
            if stopped():
                break
            size = min(self._chunk_bytes, end - address)
            try:
                self._runtime.register_host(address, size)
            except PipemaxSystemError as error:
                for pinned, _ in chunks:
                    self._runtime.unregister_host(pinned)
                raise ConfigError(_failure(end - begin, error)) from error
            chunks.append((address, size))
        self._chunks = tuple(sorted((*self._chunks, *chunks)))

    def pieces(self, address: int, size_bytes: int) -> Iterator[tuple[int, int]]:
        """(address, size) of the copies that make up that range, in order, each of COPY_BYTES at
        most: no copy may leave what was registered at once. All of it must be."""
        chunks = self._chunks
        at = bisect_right(chunks, (address, PAGESIZE << 48)) - 1
        while size_bytes:
            start, length = chunks[at]
            size = min(size_bytes, start + length - address, COPY_BYTES)
            yield address, size
            address += size
            size_bytes -= size
            at += address == start + length

    def unpin(self) -> None:
        """Safe to call twice."""
        chunks, self._chunks = self._chunks, ()
        for address, _ in chunks:
            self._runtime.unregister_host(address)


def memlock_bytes() -> int | None:
    """What this process may lock; None: no limit."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY else soft


def warn_of_memlock(size_bytes: int) -> None:
    """Drivers differ in whether they count what they pin, so that a limit is no error yet."""
    limit = memlock_bytes()
    if limit is not None and limit < size_bytes:
        log.warning(
            "RLIMIT_MEMLOCK is %s, and %s of host memory are to be pinned; if that fails, %s",
            format_size(limit),
            format_size(size_bytes),
            _REMEDY,
        )


def _failure(size_bytes: int, error: Exception) -> str:
    limit = memlock_bytes()
    shown = "unlimited" if limit is None else f"{format_size(limit)}: {_REMEDY}"
    return (
        f"cannot pin {format_size(size_bytes)} of the host pool ({error}); RLIMIT_MEMLOCK is "
        f"{shown}; or lower --kv-offloading-size"
    )


def next_page(address: int) -> int:
    """`address`, or where the next page begins."""
    return -(-address // PAGESIZE) * PAGESIZE
