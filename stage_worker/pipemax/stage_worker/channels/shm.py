"""Activations through a ring in shared memory: the sender's, mapped by the receiver."""

from collections.abc import Sequence

import torch
import zmq

from pipemax.proto.errors import WireError
from pipemax.proto.memory import MemfdHandle
from pipemax.proto.messages.activations import ActivationReady, RingOffer
from pipemax.stage_worker.channels.ring import RingShape
from pipemax.stage_worker.channels.sender import Frames
from pipemax.stage_worker.devices.base import Device, SharedTensor
from pipemax.stage_worker.dtypes import torch_dtype


class ShmWriter:
    """Owns the ring."""

    transport = "shm"

    def __init__(self, device: Device, shape: RingShape) -> None:
        self._ring = device.allocate_ring(shape.shape, torch_dtype(shape.dtype))

    def offered_memory(self) -> MemfdHandle:
        return self._ring.handle

    def write(self, slot: int, rows: torch.Tensor) -> Frames:
        self._ring.tensor[slot, : len(rows)].copy_(rows)
        return ()

    def reconnect(self, socket: zmq.Socket[bytes]) -> None:
        """A Unix socket's path outlives its process; the socket reconnects by itself."""

    def close(self) -> None:
        self._ring.close()


class ShmReader:
    """Maps the sender's ring once per life of the sender."""

    transport = "shm"

    def __init__(self, device: Device, shape: RingShape) -> None:
        self._device = device
        self._shape = shape
        self._handle: MemfdHandle | None = None
        self._ring: SharedTensor | None = None

    def attach(self, offer: RingOffer) -> None:
        if offer.handle is None:
            raise WireError("invalid_field", "ring_offer: shm needs a handle")
        if offer.handle == self._handle:
            return
        ring = self._device.open_ring(
            offer.handle, self._shape.shape, torch_dtype(self._shape.dtype)
        )
        self.close()
        self._ring, self._handle = ring, offer.handle

    def read(self, ready: ActivationReady, extra: Sequence[zmq.Frame]) -> torch.Tensor:
        if extra or self._ring is None:
            raise WireError("frames", f"step {ready.step}: rows outside the ring")
        return self._ring.tensor[ready.slot, : ready.rows]

    def close(self) -> None:
        if self._ring is not None:
            self._ring.close()
        self._ring = self._handle = None
