"""The sending end of the channel to the next stage."""

import logging

import zmq

from pipemax.proto.errors import InvariantError
from pipemax.proto.messages.activations import ActivationReady, RingAccepted, RingOffer
from pipemax.proto.messages.registry import ACTIVATIONS
from pipemax.proto.wire import Codec, encode, single_frame
from pipemax.stage_worker.channels.ring import RingShape, Rows, RowWriter

log = logging.getLogger(__name__)


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
        place = self._writer.place()
        offer = RingOffer(
            epoch=self._epoch,
            transport=self._writer.transport,
            num_slots=self._shape.num_slots,
            max_rows=self._shape.max_rows,
            hidden_size=self._shape.hidden_size,
            dtype=self._shape.dtype,
            handle=place.handle,
            cuda=place.cuda,
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
        written = self._writer.write(slot, rows)
        ready = ActivationReady(epoch=epoch, step=step, slot=slot, rows=count, event=written.event)
        self.socket.send_multipart(
            [encode(ready), *written.frames], zmq.DONTWAIT, copy=not written.frames
        )

    def close(self) -> None:
        self.socket.close()
        self._writer.close()
