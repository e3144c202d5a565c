"""Rows on their way out of a stage: from the kernels that made them to where the next stage, or a
socket, takes them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
import zmq

from pipemax.proto.cuda.runtime import Stream
from pipemax.proto.messages.activations import CudaRing
from pipemax.stage_worker.channels.ring import RingPlace, RingShape, Rows, Transport, Written
from pipemax.stage_worker.devices.cuda.buffers import DeviceBuffer, Gpu, PinnedBuffer
from pipemax.stage_worker.devices.cuda.events import EventRing
from pipemax.stage_worker.dtypes import torch_dtype

_OUT_BUFFERS = 2
"""One is copied to the host while the next step's kernels fill the other."""


@dataclass(frozen=True, slots=True)
class QueuedRows:
    """Rows of a step that is queued. `[count, hidden]`"""

    shape: Sequence[int]
    event: int
    """Behind them; -1: they are announced once they are there."""
    frame: memoryview | None = None
    """Where their bytes will be, for TCP."""

    def __len__(self) -> int:
        return self.shape[0]


class Outlet(Protocol):
    """Where the rows of a stage's steps go. One step after the other: `open`, kernels, `shut`."""

    announces_ahead: bool
    """The next stage is told of rows as soon as they are queued; else when they are there."""
    stream: Stream
    """Behind what is on this stream now, all rows so far have left."""

    def open(self, slot: int, compute: Stream) -> torch.Tensor:
        """`[max_rows, hidden]`, which kernels on `compute` may fill from now on."""

    def shut(self, slot: int, count: int, compute: Stream) -> QueuedRows:
        """The kernels that fill the first `count` rows are queued."""

    def close(self) -> None:
        """Nothing: what is queued may still write. See `free`."""

    def free(self) -> None:
        """The GPU has nothing queued."""


class DeviceOutlet:
    """Kernels write into a ring on this GPU, which the next stage maps. RowWriter and Outlet."""

    transport: Transport = "ipc"
    announces_ahead = True

    def __init__(self, gpu: Gpu, shape: RingShape, compute: Stream) -> None:
        runtime = gpu.runtime
        self.stream = compute
        self._hidden_size = shape.hidden_size
        self._ring = DeviceBuffer(gpu, shape.size_bytes)
        self._slots = self._ring.tensor(shape.shape, torch_dtype(shape.dtype))
        self._written = EventRing(runtime)
        self._place = RingPlace(
            cuda=CudaRing(
                memory=runtime.export_memory(self._ring.pointer),
                pci_bus_id=runtime.properties().pci_bus_id,
                written=self._written.handles,
            )
        )

    def open(self, slot: int, compute: Stream) -> torch.Tensor:
        return self._slots[slot]

    def shut(self, slot: int, count: int, compute: Stream) -> QueuedRows:
        return QueuedRows((count, self._hidden_size), self._written.record(compute))

    def place(self) -> RingPlace:
        return self._place

    def write(self, slot: int, rows: Rows) -> Written:
        return Written(event=cast(QueuedRows, rows).event)

    def reconnect(self, socket: zmq.Socket[bytes]) -> None:
        """A Unix socket's path outlives its process; the socket reconnects by itself."""

    def close(self) -> None: ...

    def free(self) -> None:
        del self._slots
        self._ring.close()
        self._written.close()


class _HostRing:
    """Pinned slots, which a stream of its own fills while kernels of the next step run."""

    def __init__(self, gpu: Gpu, shape: RingShape) -> None:
        runtime = self._runtime = gpu.runtime
        self._shape = shape
        self._ring = PinnedBuffer.create(runtime, "pipemax-activations", shape.size_bytes)
        self._slot_bytes = shape.max_rows * shape.row_bytes
        self._out = [DeviceBuffer(gpu, self._slot_bytes) for _ in range(_OUT_BUFFERS)]
        rows = (shape.max_rows, shape.hidden_size)
        self._rows = [buffer.tensor(rows, torch_dtype(shape.dtype)) for buffer in self._out]
        self._filled = [runtime.create_event() for _ in self._out]
        self._sent = [runtime.create_event() for _ in self._out]
        self._next = 0
        self.stream = runtime.create_stream(urgent=True)

    def open(self, slot: int, compute: Stream) -> torch.Tensor:
        self._runtime.wait(compute, self._sent[self._next])
        return self._rows[self._next]

    def _copy_out(self, slot: int, count: int, compute: Stream) -> None:
        index, runtime = self._next, self._runtime
        runtime.record(self._filled[index], compute)
        runtime.wait(self.stream, self._filled[index])
        runtime.copy(
            self._ring.pointer + slot * self._slot_bytes,
            self._out[index].pointer,
            count * self._shape.row_bytes,
            self.stream,
        )
        runtime.record(self._sent[index], self.stream)
        self._next = (index + 1) % len(self._out)

    def close(self) -> None: ...

    def free(self) -> None:
        del self._rows
        for buffer in self._out:
            buffer.close()
        self._ring.close()
        for event in (*self._filled, *self._sent):
            self._runtime.destroy_event(event)
        self._runtime.destroy_stream(self.stream)


class HostOutlet(_HostRing):
    """A ring in pinned host memory, which the next stage maps. RowWriter and Outlet."""

    transport: Transport = "shm"

    def __init__(self, gpu: Gpu, shape: RingShape, *, shares_events: bool) -> None:
        """`shares_events`: the next stage's GPU can wait for events of this one. Else its process
        hears of rows once they are there."""
        super().__init__(gpu, shape)
        self.announces_ahead = shares_events
        self._written = EventRing(gpu.runtime) if shares_events else None
        self._place = RingPlace(
            self._ring.handle,
            CudaRing(
                memory=None,
                pci_bus_id=gpu.runtime.properties().pci_bus_id,
                written=() if self._written is None else self._written.handles,
            ),
        )

    def shut(self, slot: int, count: int, compute: Stream) -> QueuedRows:
        self._copy_out(slot, count, compute)
        event = -1 if self._written is None else self._written.record(self.stream)
        return QueuedRows((count, self._shape.hidden_size), event)

    def place(self) -> RingPlace:
        return self._place

    def write(self, slot: int, rows: Rows) -> Written:
        return Written(event=cast(QueuedRows, rows).event)

    def reconnect(self, socket: zmq.Socket[bytes]) -> None:
        """As DeviceOutlet's."""

    def free(self) -> None:
        super().free()
        if self._written is not None:
            self._written.close()


class FrameOutlet(_HostRing):
    """Pinned staging, from which TCP frames are sent once the rows are in it."""

    announces_ahead = False

    def shut(self, slot: int, count: int, compute: Stream) -> QueuedRows:
        self._copy_out(slot, count, compute)
        begin = slot * self._slot_bytes
        frame = self._ring.bytes[begin : begin + count * self._shape.row_bytes]
        return QueuedRows((count, self._shape.hidden_size), -1, frame.data)
