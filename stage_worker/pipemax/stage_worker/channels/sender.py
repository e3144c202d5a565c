"""The sending end of the channel to the next stage."""

import logging
from typing import Protocol

import zmq

from pipemax.proto.errors import InvariantError
from pipemax.proto.memory import MemfdHandle
from pipemax.proto.messages.activations import ActivationReady, RingAccepted, RingOffer
from pipemax.proto.messages.registry import ACTIVATIONS
from pipemax.proto.wire import Codec, encode, single_frame
from pipemax.stage_worker.channels.ring import RingShape, Rows

log = logging.getLogger(__name__)

Frames = tuple[memoryview, ...]


class RowWriter(Protocol):
    """How rows leave this process."""

    transport: str

    def offered_memory(self) -> MemfdHandle | None:
        """What the receiver maps, when rows travel through memory."""

    def write(self, slot: int, rows: Rows) -> Frames:
        """Puts `rows` into `slot`; returns what has to travel in the message itself. The memory
        of `rows` must not change afterwards."""

    def reconnect(self, socket: zmq.Socket[bytes]) -> None:
        """Makes sure the socket leads to the receiver that lives now."""

    def close(self) -> None: ...


class ActivationSender:
    """Offers a ring on every reset and, once it is accepted, sends rows through it."""

    def __init__(self, socket: zmq.Socket[bytes], writer: RowWriter, shape: RingShape) -> None:
        self.socket = socket
        self._writer = writer
        self._shape = shape
        self._codec = Codec(ACTIVATIONS, at_binder=False)
        self._epoch = -1
        self.agreed = False
        """The receiver accepted the ring for the present epoch."""

    @property
    def transport(self) -> str:
        return self._writer.transport

    def reset(self, epoch: int) -> None:
        """Forgets the agreement."""
        self._epoch = epoch
        self.agreed = False

    def offer(self) -> None:
        """Offers the ring for this epoch. To be called again when no answer comes: the receiver
        may have been away."""
        self._writer.reconnect(self.socket)
        offer = RingOffer(
            epoch=self._epoch,
            transport=self._writer.transport,  # type: ignore[arg-type]
            num_slots=self._shape.num_slots,
            max_rows=self._shape.max_rows,
            hidden_size=self._shape.hidden_size,
            dtype=self._shape.dtype,
            handle=self._writer.offered_memory(),
        )
        try:
            self.socket.send(encode(offer), zmq.DONTWAIT)
        except zmq.Again:
            log.info("nobody to offer the activation ring to yet")

    def poll(self) -> None:
        """Handles every answer that has arrived."""
        while True:
            try:
                frames = self.socket.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                return
            message = self._codec.decode(single_frame(frames, ACTIVATIONS))
            if isinstance(message, RingAccepted) and message.epoch == self._epoch:
                self.agreed = True

    def send(self, epoch: int, step: int, slot: int, rows: Rows) -> None:
        """`rows` `[rows, hidden]` for `step`. Raises InvariantError when they do not fit the
        ring, zmq.Again when the receiver has taken nothing for ten thousand messages."""
        count, hidden_size = rows.shape
        if not (slot < self._shape.num_slots and count <= self._shape.max_rows):
            raise InvariantError(f"{count} rows for slot {slot} do not fit the ring {self._shape}")
        if hidden_size != self._shape.hidden_size:
            raise InvariantError(f"rows of {hidden_size} do not fit the ring {self._shape}")
        ready = ActivationReady(epoch=epoch, step=step, slot=slot, rows=count)
        extra = self._writer.write(slot, rows)
        self.socket.send_multipart([encode(ready), *extra], zmq.DONTWAIT, copy=not extra)

    def close(self) -> None:
        self.socket.close()
        self._writer.close()
