"""CudaRuntime on a simulated GPU."""

import ctypes
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pipemax.proto.cuda.runtime import CudaEvent, GpuProperties, Pointer, Stream
from pipemax.proto.errors import ConfigError, PipemaxSystemError
from pipemax.proto.sizes import format_size
from support.fake_cuda.events import EventHandle, FakeEvent, SharedCell
from support.fake_cuda.memory import PAGE_BYTES, POISON, MemoryHandle, Span
from support.fake_cuda.streams import FakeStream

if TYPE_CHECKING:
    from support.fake_cuda.process import FakeCudaProcess

TORN_S = 0.0005
"""Between the halves of a copy, on a machine with delays."""


class FakeCuda:
    """See CudaRuntime. Stricter than CUDA: an event is recorded by the process that made it only,
    and by one stream at a time; a mapping is opened once; memory is given up, and an event that
    other processes know destroyed, only when nothing queued needs it any more."""

    def __init__(self, gpu: int, process: "FakeCudaProcess") -> None:
        if not 0 <= gpu < len(process.visible):
            raise ConfigError(
                f"--gpus: there is no GPU {gpu}; this machine shows {len(process.visible)}"
            )
        self.gpu = gpu
        self.process = process
        self._here = process.visible[gpu]
        self._machine = process.machine

    def properties(self) -> GpuProperties:
        return GpuProperties(
            name="Simulated GPU",
            pci_bus_id=f"0000:{self._here + 0xA:02x}:00.0",
            total_bytes=self._machine.gpu_bytes,
            compute_capability=(8, 0),
            multiprocessors=4,
        )

    def memory(self) -> tuple[int, int]:
        total = self._machine.gpu_bytes
        return total - self._machine.held_bytes(self._here), total

    def can_access_peer(self, gpu: int) -> bool:
        if not 0 <= gpu < len(self.process.visible):
            raise PipemaxSystemError(f"cudaErrorInvalidDevice: there is no GPU {gpu}")
        return self._machine.are_peers(self._here, self.process.visible[gpu])

    def make_current(self) -> None:
        self.process.check()

    # Device memory.

    def allocate(self, size_bytes: int) -> Pointer:
        self._enter("allocate")
        if size_bytes <= 0:
            raise ValueError(f"device memory of {size_bytes} bytes")
        free, _ = self.memory()
        if size_bytes > free:
            raise ConfigError(
                f"GPU {self.gpu} has {format_size(free)} free, not the {format_size(size_bytes)} "
                "asked for; lower --gpu-memory-utilization or --kv-cache-memory-bytes"
            )
        span = self.process.allocate(self._here, size_bytes)
        _poison(span)
        return Pointer(span.start)

    def free(self, pointer: Pointer) -> None:
        self._enter("free")
        span = self.process.space.remove(pointer, "device")
        _poison(span)
        self.process.release(span)

    def export_memory(self, pointer: Pointer) -> bytes:
        self.process.check()
        span = self.process.space.at(pointer, "device")
        assert span.memory is not None
        return MemoryHandle(span.memory.handle, self.process.number, span.gpu).pack()

    def open_memory(self, handle: bytes) -> Pointer:
        self.process.check()
        there = MemoryHandle.unpack(handle)
        if there.process == self.process.number:
            raise PipemaxSystemError("cudaErrorDeviceUninitialized: a handle of this process")
        if not self._machine.are_peers(self._here, there.gpu):
            raise PipemaxSystemError(
                f"cudaErrorPeerAccessUnsupported: GPU {self._here} does not reach {there.gpu}"
            )
        inode = there.memory.inode
        for span in self.process.space.spans():
            if span.kind == "mapped" and span.memory and span.memory.handle.inode == inode:
                raise PipemaxSystemError("this memory is mapped already; keep the first mapping")
        return Pointer(self.process.map_other(there.gpu, there.memory).start)

    def close_memory(self, pointer: Pointer) -> None:
        self.process.check()
        self.process.release(self.process.space.remove(pointer, "mapped"))

    def array(self, pointer: Pointer, size_bytes: int) -> Any:
        self.process.check()
        for span in self.process.space.spans():
            if span.view is not None and span.holds(pointer, size_bytes):
                begin = pointer - span.start
                return span.view[begin : begin + size_bytes]
        raise PipemaxSystemError(f"{pointer:#x} is not in device memory")

    # Host memory.

    def register_host(self, address: int, size_bytes: int) -> None:
        self._enter("register_host")
        if size_bytes <= 0:
            raise ValueError(f"host memory of {size_bytes} bytes")
        if address % PAGE_BYTES:
            raise PipemaxSystemError(f"{address:#x} is not where a page begins")
        self.process.space.add(Span("host", address, size_bytes))

    def unregister_host(self, address: int) -> None:
        self._enter("unregister_host")
        self.process.space.remove(address, "host")

    # Streams and events.

    def create_stream(self, *, urgent: bool = False) -> Stream:
        self.process.check()
        return Stream(self.process.add_stream(self._here))

    def destroy_stream(self, stream: Stream) -> None:
        self._stream(stream)
        self.process.remove_stream(stream)

    def synchronize(self, stream: Stream) -> None:
        self._enter("synchronize")
        reached = threading.Event()
        self._stream(stream).add(reached.set)
        while not reached.wait(0.05):
            self.process.check()
        self.process.check()

    def create_event(self, *, interprocess: bool = False, timed: bool = False) -> CudaEvent:
        if interprocess and timed:
            raise ValueError("CUDA times no event that processes share")
        self.process.check()
        number = self.process.add_event(self._here, interprocess=interprocess, timed=timed)
        return CudaEvent(number)

    def destroy_event(self, event: CudaEvent) -> None:
        self.process.check()
        self.process.remove_event(event)

    def export_event(self, event: CudaEvent) -> bytes:
        found = self._event(event)
        cell = found.cell
        if not isinstance(cell, SharedCell) or found.imported:
            raise PipemaxSystemError(
                "cudaErrorInvalidResourceHandle: not an interprocess event of this process"
            )
        page = cell.page.memory.handle
        return EventHandle(page, self.process.number, cell.slot, cell.life).pack()

    def open_event(self, handle: bytes) -> CudaEvent:
        self.process.check()
        there = EventHandle.unpack(handle)
        if there.process == self.process.number:
            raise PipemaxSystemError("cudaErrorInvalidContext: an event of this process")
        number = self.process.import_event(self._here, there.page, there.slot, there.life)
        return CudaEvent(number)

    def record(self, event: CudaEvent, stream: Stream) -> None:
        found, queue = self._event(event), self._stream(stream)
        if found.imported:
            raise PipemaxSystemError("an event is recorded by the process that made it")
        if found.gpu != queue.gpu:
            raise PipemaxSystemError("cudaErrorInvalidResourceHandle: event and stream of two GPUs")
        if found.pending and found.stream != queue.number:
            raise PipemaxSystemError("the event is pending on another stream")
        found.stream = queue.number
        record = found.cell.recorded + 1
        found.cell.recorded = record
        queue.add(lambda: found.passes(record))

    def wait(self, stream: Stream, event: CudaEvent) -> None:
        found, queue = self._event(event), self._stream(stream)
        record = found.cell.recorded
        if found.cell.passed < record:
            queue.add(lambda: found.wait_for(record))

    def finished(self, event: CudaEvent) -> bool:
        return not self._event(event).pending

    def synchronize_event(self, event: CudaEvent) -> None:
        """Of this process only: CUDA would spin on another's."""
        self._enter("synchronize_event")
        found = self._event(event)
        if found.imported:
            raise PipemaxSystemError("waiting here for another process's event keeps a core busy")
        record = found.cell.recorded
        with self.process.changed:
            self.process.changed.wait_for(lambda: self.process.gone or found.cell.passed >= record)
        self.process.check()

    def elapsed_s(self, begin: CudaEvent, end: CudaEvent) -> float:
        first, second = self._event(begin), self._event(end)
        for event in (first, second):
            if not event.timed or not event.cell.recorded:
                raise PipemaxSystemError(
                    "cudaErrorInvalidResourceHandle: elapsed time: an event that is not timed or "
                    "was never recorded"
                )
            if event.pending:
                raise PipemaxSystemError("cudaErrorNotReady: elapsed time: an event is pending")
        return second.passed_s - first.passed_s

    # Copies.

    def copy(self, target: int, source: int, size_bytes: int, stream: Stream) -> None:
        queue = self._stream(stream)
        if size_bytes <= 0:
            raise ValueError(f"a copy of {size_bytes} bytes")
        spans = self._touch((target, size_bytes), (source, size_bytes))
        half = size_bytes // 2 if self._machine.delay_s else 0

        def run() -> None:
            if half:
                ctypes.memmove(target, source, half)
                time.sleep(TORN_S)
            ctypes.memmove(target + half, source + half, size_bytes - half)
            self._touched(spans)

        queue.add(run)

    def fill_zero(self, pointer: Pointer, size_bytes: int, stream: Stream) -> None:
        queue = self._stream(stream)
        spans = self._touch((pointer, size_bytes))

        def run() -> None:
            ctypes.memset(pointer, 0, size_bytes)
            self._touched(spans)

        queue.add(run)

    def call(self, stream: Stream, kernels: Callable[[], None]) -> None:
        """Queues work of this process, as a kernel would be. What it raises breaks the GPU for this
        process, as with CUDA."""
        self._stream(stream).add(kernels)

    # Behind the calls.

    def _enter(self, call: str) -> None:
        self.process.check()
        self.process.may_block(call)

    def _stream(self, stream: int) -> FakeStream:
        self.process.check()
        found = self.process.stream(stream)
        if found.gpu != self._here:
            raise PipemaxSystemError(
                "cudaErrorInvalidResourceHandle: a stream of another GPU than this runtime's"
            )
        return found

    def _event(self, event: int) -> FakeEvent:
        self.process.check()
        return self.process.event(event)

    def _touch(self, *ranges: tuple[int, int]) -> list[Span]:
        spans: list[Span] = []
        try:
            for address, size_bytes in ranges:
                spans.append(self.process.space.touch(address, size_bytes))
        except PipemaxSystemError:
            self._touched(spans)
            raise
        return spans

    def _touched(self, spans: list[Span]) -> None:
        for span in spans:
            self.process.space.touched(span)


def _poison(span: Span) -> None:
    assert span.view is not None
    span.view[:] = POISON
