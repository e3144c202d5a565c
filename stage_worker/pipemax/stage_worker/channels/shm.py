"""Activations through a ring in shared memory: the sender's, mapped by the receiver."""

from collections.abc import Sequence
from typing import Final, Literal

import zmq

from pipemax.proto.errors import WireError
from pipemax.proto.memory import MemfdHandle
from pipemax.proto.messages.activations import ActivationReady, RingOffer
from pipemax.stage_worker.channels.ring import (
    Ring,
    RingPlace,
    RingShape,
    RowReader,
    Rows,
    RowWriter,
    SharedRings,
    Transport,
    Written,
)


class HostMemoryTransport:
    """The part of RingMemory that is the same for every device whose rows lie in host memory."""

    def transport(self, wanted: Literal["auto"] | Transport, sender: int) -> Transport:
        return "tcp" if wanted == "tcp" else "shm"

    def row_writer(self: SharedRings, transport: Transport, shape: RingShape) -> RowWriter:
        return ShmWriter(self, shape)

    def row_reader(self: SharedRings, transport: Transport, shape: RingShape) -> RowReader:
        return ShmReader(self, shape)


class ShmWriter:
    """Owns the ring."""

    transport: Final = "shm"

    def __init__(self, memory: SharedRings, shape: RingShape) -> None:
        self._ring = memory.allocate_ring(shape)

    def place(self) -> RingPlace:
        return RingPlace(self._ring.handle)

    def write(self, slot: int, rows: Rows) -> Written:
        self._ring.write(slot, rows)
        return Written()

    def reconnect(self, socket: zmq.Socket[bytes]) -> None:
        """A Unix socket's path outlives its process; the socket reconnects by itself."""

    def close(self) -> None:
        self._ring.close()


class ShmReader:
    """Maps the sender's ring once per life of the sender."""

    transport: Final = "shm"

    def __init__(self, memory: SharedRings, shape: RingShape) -> None:
        self._memory = memory
        self._shape = shape
        self._handle: MemfdHandle | None = None
        self._ring: Ring | None = None

    def attach(self, offer: RingOffer) -> None:
        if offer.handle is None:
            raise WireError("invalid_field", "ring_offer: shm needs a handle")
        if offer.handle == self._handle:
            return
        ring = self._memory.open_ring(offer.handle, self._shape)
        self.close()
        self._ring, self._handle = ring, offer.handle

    def read(self, ready: ActivationReady, extra: Sequence[zmq.Frame]) -> Rows:
        if extra or self._ring is None:
            raise WireError("frames", f"step {ready.step}: rows outside the ring")
        return self._ring.read(ready.slot, ready.rows)

    def close(self) -> None:
        if self._ring is not None:
            self._ring.close()
        self._ring = self._handle = None
