"""The receiving end of the channel from the previous stage."""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import zmq

from pipemax.proto.errors import ConfigError, PipemaxSystemError, WireError
from pipemax.proto.messages.activations import ActivationReady, RingAccepted, RingOffer
from pipemax.proto.messages.registry import ACTIVATIONS
from pipemax.proto.wire import Codec, encode
from pipemax.stage_worker.channels.ring import RingShape, RowReader, Rows

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Arrival:
    """`rows` is `[rows, hidden]`, in place: valid until the slot's next step is sent."""

    epoch: int
    step: int
    rows: Rows


class ActivationReceiver:
    """Accepts the previous stage's ring once per epoch and hands out what arrives."""

    def __init__(
        self, socket: zmq.Socket[bytes], peer: bytes, reader: RowReader, shape: RingShape
    ) -> None:
        """`peer`: routing identity of the only process that may send."""
        self.socket = socket
        self._peer = peer
        self._reader = reader
        self._shape = shape
        self._codec = Codec(ACTIVATIONS, at_binder=True)
        self._epoch = -1
        self._offer: RingOffer | None = None
        self.agreed = False
        """The ring of the present epoch is attached and the sender knows."""

    @property
    def transport(self) -> str:
        return self._reader.transport

    def reset(self, epoch: int) -> None:
        """Forgets the agreement. An offer for `epoch` that was faster than the reset counts."""
        self._epoch = epoch
        self.agreed = False
        self._answer()

    def poll(self) -> Iterator[Arrival]:
        """Everything of the present epoch that has arrived. Raises ConfigError when the offered
        ring is not the one this stage expects, WireError when the sender breaks the protocol."""
        while True:
            try:
                identity, *frames = self.socket.recv_multipart(zmq.DONTWAIT, copy=False)
            except zmq.Again:
                return
            if identity.bytes != self._peer:
                log.warning("ignored a message of %r, which does not send here", identity.bytes)
                continue
            if not frames:
                raise WireError("frames", "an empty message on act")
            message = self._codec.decode(frames[0].buffer)
            if isinstance(message, RingOffer):
                self._offer = message
                self._answer()
            elif isinstance(message, ActivationReady) and message.epoch == self._epoch:
                yield self._arrival(message, frames[1:])

    def _arrival(self, ready: ActivationReady, extra: Sequence[zmq.Frame]) -> Arrival:
        if not self.agreed:
            raise WireError("too_early", f"step {ready.step} was sent before the ring was agreed")
        if ready.slot >= self._shape.num_slots or ready.rows > self._shape.max_rows:
            raise WireError("invalid_field", f"{ready} does not fit the ring {self._shape}")
        return Arrival(ready.epoch, ready.step, self._reader.read(ready, extra))

    def _answer(self) -> None:
        """Accepts the offer for this epoch; an older one is void, a newer one waits for our own
        reset. The same offer again means that our answer was lost."""
        offer = self._offer
        if offer is None or offer.epoch != self._epoch:
            return
        difference = self._shape.difference(offer)
        if offer.transport != self._reader.transport:
            difference = f"transport is {offer.transport} there and {self._reader.transport} here"
        if difference is not None:
            raise ConfigError(
                f"{self._peer.decode()} and its successor do not agree on activations: "
                f"{difference}; start all stages with one configuration and one model"
            )
        try:
            self._reader.attach(offer)
        except PipemaxSystemError as error:
            log.warning("cannot attach the ring of %s: %s", self._peer.decode(), error)
            return
        with contextlib.suppress(zmq.Again, zmq.ZMQError):  # it asks again when it is back
            accepted = encode(RingAccepted(epoch=self._epoch))
            self.socket.send_multipart([self._peer, accepted], zmq.DONTWAIT)
            self.agreed = True

    def close(self) -> None:
        self.socket.close()
        self._reader.close()
