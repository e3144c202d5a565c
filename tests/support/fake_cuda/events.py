"""Events: how often each was recorded, and how many of these records have been passed."""

import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from pipemax.proto.errors import PipemaxSystemError
from pipemax.proto.memory import MemfdHandle, SharedMemory

PAGE_EVENTS = 4096
_CELL_WORDS = 3
_LIFE, _RECORDED, _PASSED = range(_CELL_WORDS)
_SHORTEST_S, _LONGEST_S = 1e-4, 2e-3
"""Between looks at another process's event."""


class Abandoned(Exception):  # noqa: N818 - the end of a stream, not a mistake
    """The process of the stream is no more."""


class Cell(Protocol):
    recorded: int
    passed: int


@dataclass
class LocalCell:
    recorded: int = 0
    passed: int = 0


class EventPage:
    """Cells of one process's interprocess events: three words each, of which every word is written
    by one thread at a time."""

    def __init__(self, memory: SharedMemory) -> None:
        self.memory = memory
        self.words = memory.buffer.cast("Q")
        self.users = 0

    @classmethod
    def create(cls) -> "EventPage":
        return cls(SharedMemory.create("fake-cuda-events", PAGE_EVENTS * _CELL_WORDS * 8))

    def close(self) -> None:
        self.words.release()
        self.memory.close()


class SharedCell:
    """One event in a page, during one life: destroying the event begins the next."""

    def __init__(self, page: EventPage, slot: int, life: int) -> None:
        self.page = page
        self.slot = slot
        self.life = life
        self._base = slot * _CELL_WORDS

    def check(self) -> None:
        if self.page.words[self._base + _LIFE] != self.life:
            raise PipemaxSystemError("the event's owner has destroyed it: CUDA may do anything")

    def begin(self) -> None:
        words = self.page.words
        words[self._base + _RECORDED] = words[self._base + _PASSED] = 0
        words[self._base + _LIFE] = self.life

    def end(self) -> None:
        self.page.words[self._base + _LIFE] = 0

    @property
    def recorded(self) -> int:
        self.check()
        return self.page.words[self._base + _RECORDED]

    @recorded.setter
    def recorded(self, value: int) -> None:
        self.page.words[self._base + _RECORDED] = value

    @property
    def passed(self) -> int:
        self.check()
        return self.page.words[self._base + _PASSED]

    @passed.setter
    def passed(self, value: int) -> None:
        self.page.words[self._base + _PASSED] = value


@dataclass(eq=False)
class FakeEvent:
    gpu: int
    cell: Cell
    changed: threading.Condition
    """Of the process."""
    is_gone: Callable[[], bool]
    """The process is no more."""
    timed: bool = False
    imported: bool = False
    stream: int = -1
    """That recorded it last."""
    passed_s: float = 0.0

    @property
    def pending(self) -> bool:
        return self.cell.passed < self.cell.recorded

    def passes(self, record: int) -> None:
        """On the stream's thread."""
        self.passed_s = time.perf_counter()
        with self.changed:
            self.cell.passed = record
            self.changed.notify_all()

    def wait_for(self, record: int) -> None:
        """Blocks the calling thread. Raises Abandoned when this process ends first."""
        if self.imported:
            self._poll_for(record)
            return
        with self.changed:
            self.changed.wait_for(lambda: self.is_gone() or self.cell.passed >= record)
        if self.is_gone():
            raise Abandoned

    def _poll_for(self, record: int) -> None:
        pause_s = _SHORTEST_S
        while not self.is_gone():
            if self.cell.passed >= record:
                return
            time.sleep(pause_s)
            pause_s = min(_LONGEST_S, pause_s * 1.5)
        raise Abandoned


_EVENT = struct.Struct("<8sQQQQQLLQ")
_EVENT_MAGIC = b"fake-evt"


@dataclass(frozen=True, slots=True)
class EventHandle:
    """What the 64 bytes of an event's IPC handle say."""

    page: MemfdHandle
    process: int
    slot: int
    life: int

    def pack(self) -> bytes:
        p = self.page
        return _EVENT.pack(
            _EVENT_MAGIC, p.pid, p.fd, p.inode, p.size_bytes, self.process, self.slot, 0, self.life
        )

    @staticmethod
    def unpack(handle: bytes) -> "EventHandle":
        if len(handle) != _EVENT.size or not handle.startswith(_EVENT_MAGIC):
            raise PipemaxSystemError("cudaErrorInvalidResourceHandle: not a handle of an event")
        _, pid, fd, inode, size_bytes, process, slot, _, life = _EVENT.unpack(handle)
        page = MemfdHandle(pid=pid, fd=fd, inode=inode, size_bytes=size_bytes)
        return EventHandle(page, process, slot, life)
