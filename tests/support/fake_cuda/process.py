"""What one process has of the simulated CUDA."""

import itertools
import json
import secrets
import threading
import time
from pathlib import Path
from typing import NamedTuple, TypeVar

from pipemax.proto.errors import PipemaxSystemError
from pipemax.proto.memory import MemfdHandle, SharedMemory
from support.fake_cuda.events import PAGE_EVENTS, EventPage, FakeEvent, LocalCell, SharedCell
from support.fake_cuda.machine import FakeMachine
from support.fake_cuda.memory import AddressSpace, Span, view_of
from support.fake_cuda.runtime import FakeCuda
from support.fake_cuda.streams import FakeStream, lateness

JOIN_S = 5.0
_FIRST_STREAM, _FIRST_EVENT = 1 << 20, 1 << 30
"""So that handles of one kind are not taken for another, nor for an index."""

Thing = TypeVar("Thing")


class BlockingCall(NamedTuple):
    """A call that may block the host."""

    at_s: float
    """`time.monotonic`, which all processes share."""
    call: str
    thread: str


class FakeCudaProcess:
    """Usually one per process. Several in one process behave as if each were a process of its own,
    so that a test can play both ends.

    visible: the machine's GPUs that this process sees, in its order (CUDA_VISIBLE_DEVICES).
    """

    def __init__(self, machine: FakeMachine, visible: tuple[int, ...] | None = None) -> None:
        self.machine = machine
        self.visible = tuple(range(machine.num_gpus)) if visible is None else visible
        self.number = secrets.randbits(63)
        self.space = AddressSpace()
        self.blocking_calls: list[BlockingCall] = []
        self.changed = threading.Condition()
        self._gone = False
        self._failure: str | None = None
        self._streams: dict[int, FakeStream] = {}
        self._ended_streams: list[FakeStream] = []
        self._events: dict[int, FakeEvent] = {}
        self._numbers = itertools.count(1)
        self._page: EventPage | None = None
        self._free_slots = list(range(PAGE_EVENTS))
        self._opened_pages: dict[MemfdHandle, EventPage] = {}

    def open_runtime(self, gpu: int) -> FakeCuda:
        """Goes in the place of `pipemax.proto.cuda.open_runtime`."""
        return FakeCuda(gpu, self)

    @property
    def gone(self) -> bool:
        return self._gone

    def die(self) -> None:
        """As kill -9 would have it: nothing that is queued runs on, all memory is given back. Also
        how a test ends a process whose streams wait for one that is dead."""
        with self.changed:
            self._gone = True
            self.changed.notify_all()
        streams = [*self._streams.values(), *self._ended_streams]
        for stream in streams:
            stream.end()
        for stream in streams:
            stream.join(JOIN_S)
        for span in self.space.forget():
            self.release(span)
        self._events.clear()
        for page in [*self._opened_pages.values(), *([self._page] if self._page else [])]:
            page.close()
        self._opened_pages.clear()
        self._page = None

    def close(self) -> None:
        """For the end of a test: everything queued must come to its end within a few seconds."""
        failure = self._failure
        streams = [*self._streams.values(), *self._ended_streams]
        for stream in streams:
            stream.end()
        for stream in streams:
            stream.join(JOIN_S)
        stuck = [stream.number for stream in streams if stream.alive]
        self.die()
        if failure is not None:
            raise PipemaxSystemError(f"an operation on a stream failed: {failure}")
        if stuck:
            raise PipemaxSystemError(f"streams {stuck} wait for what never comes")

    def check(self) -> None:
        """What went wrong on a stream is raised by whatever is called next, and ever after."""
        if self._failure is not None:
            raise PipemaxSystemError(f"an operation on a stream failed: {self._failure}")
        if self._gone:
            raise PipemaxSystemError("this process is dead")

    def fail(self, reason: str) -> None:
        """On a stream's thread. Whoever waits learns of it."""
        self._failure = reason
        with self.changed:
            self._gone = True
            self.changed.notify_all()

    def may_block(self, call: str) -> None:
        """Notes a call that may block the host."""
        thread = threading.current_thread().name
        self.blocking_calls.append(BlockingCall(time.monotonic(), call, thread))

    def save_blocking_calls(self, path: Path) -> None:
        path.write_text(json.dumps(self.blocking_calls))

    # Device memory.

    def allocate(self, gpu: int, size_bytes: int) -> Span:
        return self._map(gpu, SharedMemory.create("fake-cuda-memory", size_bytes), "device")

    def map_other(self, gpu: int, handle: MemfdHandle) -> Span:
        return self._map(gpu, SharedMemory.open(handle), "mapped")

    def _map(self, gpu: int, memory: SharedMemory, kind: str) -> Span:
        view = view_of(memory)
        inode = memory.handle.inode
        span = Span(
            "device" if kind == "device" else "mapped",
            view.ctypes.data,
            memory.size_bytes,
            gpu,
            memory,
            view,
            self.machine.hold(gpu, str(self.number), inode, memory.size_bytes),
        )
        self.space.add(span)
        return span

    def release(self, span: Span) -> None:
        span.view = None
        if span.memory is not None:
            span.memory.close()
        if span.holding is not None:
            span.holding.unlink(missing_ok=True)

    # Streams.

    def add_stream(self, gpu: int) -> int:
        made = next(self._numbers)
        machine = self.machine
        late = lateness(f"{machine.seed}/{gpu}/{made}", machine.delay_s, machine.delayed_share)
        number = _FIRST_STREAM + made
        self._streams[number] = FakeStream(number, gpu, late, self.fail, self._is_gone)
        return number

    def stream(self, number: int) -> FakeStream:
        return _known(self._streams, number, "stream")

    def remove_stream(self, number: int) -> None:
        stream = self.stream(number)
        del self._streams[number]
        stream.end()
        self._ended_streams = [s for s in self._ended_streams if s.alive]
        self._ended_streams.append(stream)

    # Events.

    def add_event(self, gpu: int, *, interprocess: bool, timed: bool) -> int:
        cell = self._new_cell() if interprocess else LocalCell()
        return self._number(FakeEvent(gpu, cell, self.changed, self._is_gone, timed=timed))

    def _is_gone(self) -> bool:
        return self._gone

    def _number(self, event: FakeEvent) -> int:
        number = _FIRST_EVENT + next(self._numbers)
        self._events[number] = event
        return number

    def event(self, number: int) -> FakeEvent:
        return _known(self._events, number, "event")

    def remove_event(self, number: int) -> None:
        event = self.event(number)
        cell = event.cell
        if isinstance(cell, SharedCell):
            if event.imported:
                self._leave_page(cell.page)
            elif event.pending:
                raise PipemaxSystemError("an event that others may wait for is destroyed pending")
            else:
                cell.end()
                self._free_slots.append(cell.slot)
        del self._events[number]

    def _new_cell(self) -> SharedCell:
        if self._page is None:
            self._page = EventPage.create()
        cell = SharedCell(self._page, self._free_slots.pop(), next(self._numbers))
        cell.begin()
        return cell

    def import_event(self, gpu: int, page_handle: MemfdHandle, slot: int, life: int) -> int:
        page = self._opened_pages.get(page_handle)
        if page is None:
            page = EventPage(SharedMemory.open(page_handle))
            self._opened_pages[page_handle] = page
        page.users += 1
        cell = SharedCell(page, slot, life)
        try:
            cell.check()
        except PipemaxSystemError:
            self._leave_page(page)
            raise
        event = FakeEvent(gpu, cell, self.changed, self._is_gone, imported=True)
        return self._number(event)

    def _leave_page(self, page: EventPage) -> None:
        page.users -= 1
        if not page.users:
            self._opened_pages = {h: p for h, p in self._opened_pages.items() if p is not page}
            page.close()


def _known(things: dict[int, Thing], number: int, kind: str) -> Thing:
    found = things.get(number)
    if found is None:
        raise PipemaxSystemError(
            f"cudaErrorInvalidResourceHandle: {number} is no {kind} of this process, or no longer"
        )
    return found
