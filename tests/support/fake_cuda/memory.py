"""The addresses that copies of one process may touch."""

import struct
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from pipemax.proto.errors import PipemaxSystemError
from pipemax.proto.memory import MemfdHandle, SharedMemory

PAGE_BYTES = 4096
POISON = 0xFF
"""Fills memory that was never written, and memory that was freed: NaN in every float type."""

Kind = Literal["device", "mapped", "host"]


@dataclass(eq=False)
class Span:
    """Device memory of this process, of another, or registered host memory."""

    kind: Kind
    start: int
    size_bytes: int
    gpu: int = -1
    memory: SharedMemory | None = None
    view: npt.NDArray[np.uint8] | None = field(default=None, repr=False)
    """Of device memory; keeps it mapped."""
    holding: Path | None = None
    queued: int = 0
    """Operations on streams that will touch it."""

    @property
    def end(self) -> int:
        return self.start + self.size_bytes

    def holds(self, address: int, size_bytes: int) -> bool:
        return self.start <= address and address + size_bytes <= self.end


class AddressSpace:
    """Used from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spans: dict[int, Span] = {}
        """By start."""

    def add(self, span: Span) -> None:
        """Host memory must not share a page with what is registered already."""
        with self._lock:
            for other in self._spans.values():
                if span.start < _page_end(other) and other.start < _page_end(span):
                    raise PipemaxSystemError(f"{_words(span)}: is in use already: {_words(other)}")
            self._spans[span.start] = span

    def at(self, start: int, kind: Kind) -> Span:
        """The span that begins there."""
        with self._lock:
            span = self._spans.get(start)
        if span is None or span.kind != kind:
            raise PipemaxSystemError(f"{start:#x} is not the beginning of {kind} memory")
        return span

    def remove(self, start: int, kind: Kind) -> Span:
        """Raises PipemaxSystemError while something is queued that touches it."""
        span = self.at(start, kind)
        with self._lock:
            if span.queued:
                raise PipemaxSystemError(
                    f"{_words(span)}: given up while {span.queued} operations on it are queued"
                )
            del self._spans[start]
        return span

    def touch(self, address: int, size_bytes: int) -> Span:
        """The span that holds this range, with one more operation queued on it."""
        with self._lock:
            for span in self._spans.values():
                if span.holds(address, size_bytes):
                    span.queued += 1
                    return span
        raise PipemaxSystemError(
            f"cudaErrorInvalidValue: {size_bytes} bytes at {address:#x} are neither in one "
            "allocation nor in one registered range"
        )

    def touched(self, span: Span) -> None:
        """An operation on it has run."""
        with self._lock:
            span.queued -= 1

    def spans(self) -> list[Span]:
        with self._lock:
            return list(self._spans.values())

    def forget(self) -> list[Span]:
        """Everything, whatever is queued: the process is gone."""
        with self._lock:
            spans = list(self._spans.values())
            self._spans.clear()
        return spans


def _page_end(span: Span) -> int:
    return -(-span.end // PAGE_BYTES) * PAGE_BYTES


def _words(span: Span) -> str:
    return f"{span.size_bytes} bytes of {span.kind} memory at {span.start:#x}"


def view_of(memory: SharedMemory) -> npt.NDArray[np.uint8]:
    return np.frombuffer(memory.buffer, np.uint8)


_MEMORY = struct.Struct("<8sQQQQQQQ")
_MEMORY_MAGIC = b"fake-mem"


@dataclass(frozen=True, slots=True)
class MemoryHandle:
    """What the 64 bytes of a memory's IPC handle say."""

    memory: MemfdHandle
    process: int
    """Number of the FakeCudaProcess."""
    gpu: int
    """As the machine counts them."""

    def pack(self) -> bytes:
        m = self.memory
        return _MEMORY.pack(
            _MEMORY_MAGIC, m.pid, m.fd, m.inode, m.size_bytes, self.process, self.gpu, 0
        )

    @staticmethod
    def unpack(handle: bytes) -> "MemoryHandle":
        if len(handle) != _MEMORY.size or not handle.startswith(_MEMORY_MAGIC):
            raise PipemaxSystemError("cudaErrorInvalidResourceHandle: not a handle of memory")
        _, pid, fd, inode, size_bytes, process, gpu, _ = _MEMORY.unpack(handle)
        return MemoryHandle(
            MemfdHandle(pid=pid, fd=fd, inode=inode, size_bytes=size_bytes), process, gpu
        )
