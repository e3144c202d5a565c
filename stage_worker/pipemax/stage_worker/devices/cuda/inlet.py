"""Rows on their way into a stage: from where they were announced to be to the kernels' input."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import zmq

from pipemax.proto.cuda.runtime import CudaRuntime, Stream
from pipemax.proto.errors import ConfigError, WireError
from pipemax.proto.memory import MemfdHandle, SharedMemory
from pipemax.proto.messages.activations import ActivationReady, RingOffer
from pipemax.stage_worker.channels.ring import RingShape, Rows, Transport
from pipemax.stage_worker.devices.cuda.buffers import DeviceBuffer, Gpu, Leftovers, PinnedBuffer
from pipemax.stage_worker.devices.cuda.events import PeerEvents
from pipemax.stage_worker.dtypes import torch_dtype

_LANDING_BUFFERS = 2
"""Rows of the next step arrive while kernels read those of this one."""


@dataclass(frozen=True, slots=True)
class ArrivedRows:
    """Rows that were announced. `[count, hidden]`"""

    shape: Sequence[int]
    address: int
    written: PeerEvents | None
    event: int
    """Number in `written`; -1: they are there."""

    def __len__(self) -> int:
        return self.shape[0]


class Inlet:
    """Brings announced rows next to the kernels, on a stream of its own. One step after the other:
    `take`, kernels, `release`."""

    def __init__(self, gpu: Gpu, shape: RingShape) -> None:
        runtime = self._runtime = gpu.runtime
        self._row_bytes = shape.row_bytes
        size_bytes = shape.max_rows * shape.row_bytes
        self._landing = [DeviceBuffer(gpu, size_bytes) for _ in range(_LANDING_BUFFERS)]
        rows = (shape.max_rows, shape.hidden_size)
        self._rows = [buffer.tensor(rows, torch_dtype(shape.dtype)) for buffer in self._landing]
        self._landed = [runtime.create_event() for _ in self._landing]
        self._read = [runtime.create_event() for _ in self._landing]
        self._next = 0
        self._stream = runtime.create_stream(urgent=True)

    def take(self, rows: Rows, compute: Stream) -> torch.Tensor:
        """`[count, hidden]`, valid on `compute` until `release`."""
        arrived, index, runtime = cast(ArrivedRows, rows), self._next, self._runtime
        runtime.wait(self._stream, self._read[index])
        if arrived.written is not None and arrived.event >= 0:
            arrived.written.wait(self._stream, arrived.event)
        runtime.copy(
            self._landing[index].pointer,
            arrived.address,
            len(arrived) * self._row_bytes,
            self._stream,
        )
        runtime.record(self._landed[index], self._stream)
        runtime.wait(compute, self._landed[index])
        return self._rows[index][: len(arrived)]

    def release(self, compute: Stream) -> None:
        """The kernels that read the rows taken last are queued."""
        self._runtime.record(self._read[self._next], compute)
        self._next = (self._next + 1) % len(self._landing)

    def free(self) -> None:
        """The GPU has nothing queued."""
        del self._rows
        for buffer in self._landing:
            buffer.close()
        for event in (*self._landed, *self._read):
            self._runtime.destroy_event(event)
        self._runtime.destroy_stream(self._stream)


class RingReader:
    """RowReader of a ring that the sender owns: on a GPU (`ipc`) or pinned by both ends (`shm`).
    Mapped once per life of the sender."""

    def __init__(
        self,
        runtime: CudaRuntime,
        transport: Transport,
        shape: RingShape,
        leftovers: Leftovers,
        sender_pci_bus_id: str | None,
    ) -> None:
        """`sender_pci_bus_id`: of the GPU that the sender computes on, where it is this stage's."""
        self.transport: Transport = transport
        self._runtime = runtime
        self._shape = shape
        self._leftovers = leftovers
        self._sender_pci_bus_id = sender_pci_bus_id
        self._offer: RingOffer | None = None
        self._opened = contextlib.ExitStack()
        self._written: PeerEvents | None = None
        self._address = 0

    def attach(self, offer: RingOffer) -> None:
        known = self._offer
        if known is not None and (known.cuda, known.handle) == (offer.cuda, offer.handle):
            return
        self._check(offer)
        self.close()
        with contextlib.ExitStack() as stack:
            self._written = self._open_events(offer, stack)
            self._address = self._open_ring(offer, stack)
            self._opened = stack.pop_all()
        self._offer = offer

    def _check(self, offer: RingOffer) -> None:
        if offer.cuda is None:
            raise WireError("invalid_field", f"ring_offer: {offer.transport} on GPUs needs events")
        if (offer.cuda.memory is None) != (offer.handle is not None):
            raise WireError("invalid_field", "ring_offer: memory on a GPU or a handle, not both")
        if (offer.cuda.memory is None) != (self.transport == "shm"):
            raise WireError(
                "invalid_field", f"ring_offer: {self.transport} with the other's memory"
            )
        if self._sender_pci_bus_id not in (None, offer.cuda.pci_bus_id):
            raise ConfigError(
                f"the previous stage computes on the GPU at {offer.cuda.pci_bus_id}, this one on "
                f"{self._sender_pci_bus_id}, under one number; start all stages with one "
                "CUDA_VISIBLE_DEVICES"
            )

    def _open_events(self, offer: RingOffer, stack: contextlib.ExitStack) -> PeerEvents:
        assert offer.cuda is not None
        written = PeerEvents(self._runtime, offer.cuda.written)
        stack.callback(written.close)
        return written

    def _open_ring(self, offer: RingOffer, stack: contextlib.ExitStack) -> int:
        """Address of the sender's ring in this process."""
        assert offer.cuda is not None
        if offer.cuda.memory is not None:
            pointer = self._runtime.open_memory(offer.cuda.memory)
            stack.callback(self._runtime.close_memory, pointer)
            return pointer
        assert offer.handle is not None
        ring = open_pinned(self._runtime, offer.handle, self._shape.size_bytes)
        stack.callback(ring.close)
        return ring.pointer

    def read(self, ready: ActivationReady, extra: Sequence[zmq.Frame]) -> Rows:
        if extra or self._written is None:
            raise WireError("frames", f"step {ready.step}: rows outside the ring")
        slot_bytes = self._shape.max_rows * self._shape.row_bytes
        address = self._address + ready.slot * slot_bytes
        shape = (ready.rows, self._shape.hidden_size)
        return ArrivedRows(shape, address, self._written, ready.event)

    def close(self) -> None:
        """What is queued may read the ring still."""
        self._leftovers.add(self._opened.pop_all().close)
        self._offer = self._written = None


def open_pinned(runtime: CudaRuntime, handle: MemfdHandle, size_bytes: int) -> PinnedBuffer:
    """A peer's segment. Raises PipemaxSystemError when the peer is gone, WireError when the segment
    is smaller than it has to be."""
    if handle.size_bytes < size_bytes:
        raise WireError(
            "invalid_field", f"a ring of {size_bytes} bytes in a segment of {handle.size_bytes}"
        )
    return PinnedBuffer(runtime, SharedMemory.open(handle))


class FrameRing:
    """FrameSlots in pinned memory."""

    def __init__(self, runtime: CudaRuntime, shape: RingShape, leftovers: Leftovers) -> None:
        self._shape = shape
        self._ring = PinnedBuffer.create(runtime, "pipemax-activations", shape.size_bytes)
        self._leftovers = leftovers

    def read(self, slot: int, count: int) -> ArrivedRows:
        shape = (count, self._shape.hidden_size)
        return ArrivedRows(shape, self._ring.pointer + self._begin(slot), None, -1)

    def frame(self, slot: int, count: int) -> memoryview:
        begin = self._begin(slot)
        return self._ring.bytes[begin : begin + count * self._shape.row_bytes].data

    def _begin(self, slot: int) -> int:
        return slot * self._shape.max_rows * self._shape.row_bytes

    def close(self) -> None:
        """What is queued may read it still."""
        self._leftovers.add(self._ring.close)
