"""The last stage's channels to the sampler workers. Imports no torch.

Logits lie in a ring in shared memory with one entry for each micro-batch slot, and no other flow
control: a slot's next step is planned only when the tokens of the one before are all at the
coordinator, so whoever read the entry has done with it by construction. Nor does a reset need any:
samplers answer it when they read nothing any more, and steps are planned when all have answered.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import zmq

from pipemax.proto.memory import MemfdHandle
from pipemax.proto.messages.control import StepPlan
from pipemax.proto.messages.logits import LogitsAccepted, LogitsOffer, LogitsReady
from pipemax.proto.messages.registry import LOGITS
from pipemax.proto.messages.types import Message, pack_i32
from pipemax.proto.wire import Codec, encode, single_frame

LOGIT_BYTES: Final = 4
"""float32, in which a stage's head gives them: samplers then see the same numbers as the stage's
own sampler, and no row is converted twice."""

Shares = tuple[tuple[int, ...], ...]
"""By sampler, indices of a plan's sample rows. In the ring's entry the rows lie in this order."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LogitsShape:
    """float32 `[num_slots, max_rows, vocab_size]`."""

    num_slots: int
    max_rows: int
    vocab_size: int

    @property
    def entry_bytes(self) -> int:
        return LOGIT_BYTES * self.max_rows * self.vocab_size

    @property
    def size_bytes(self) -> int:
        return self.num_slots * self.entry_bytes


@dataclass(frozen=True, slots=True)
class LogitsPlace:
    """A ring, for those who read it."""

    handle: MemfdHandle
    shape: LogitsShape


class LogitsSender:
    """Offers the ring to every sampler on every reset and, once all have accepted, tells each of
    its share of a step."""

    def __init__(self, sockets: Sequence[zmq.Socket[bytes]], place: LogitsPlace) -> None:
        """`sockets` lead to the samplers, in order; `place` is the engine's, who writes there."""
        self.sockets = tuple(sockets)
        self._place = place
        self._codec = Codec(LOGITS, at_binder=False)
        self._epoch = -1
        self._accepted = [False] * len(self.sockets)

    @property
    def agreed(self) -> bool:
        """All samplers accepted the ring for the present epoch."""
        return all(self._accepted)

    def reset(self, epoch: int) -> None:
        """Forgets the agreement."""
        self._epoch = epoch
        self._accepted = [False] * len(self.sockets)

    def offer(self) -> None:
        """Offers the ring to those who have not accepted it. To be called again when no answer
        comes: a sampler may have been away."""
        shape = self._place.shape
        offer = LogitsOffer(
            epoch=self._epoch,
            handle=self._place.handle,
            num_slots=shape.num_slots,
            max_rows=shape.max_rows,
            vocab_size=shape.vocab_size,
        )
        for index, accepted in enumerate(self._accepted):
            if not accepted:
                self._send(index, offer)

    def poll(self) -> None:
        """Handles every answer that has arrived. Raises WireError."""
        for index, socket in enumerate(self.sockets):
            while True:
                try:
                    frames = socket.recv_multipart(zmq.DONTWAIT)
                except zmq.Again:
                    break
                message = self._codec.decode(single_frame(frames, LOGITS))
                if isinstance(message, LogitsAccepted) and message.epoch == self._epoch:
                    self._accepted[index] = True

    def send(self, plan: StepPlan, shares: Shares) -> None:
        """The logits of `shares` lie in entry `plan.slot`. Samplers also learn which requests have
        ended, of those whose rules they may keep."""
        first_row = 0
        for index in range(len(self.sockets)):
            rows = shares[index] if shares else ()
            ended = tuple(key for key in plan.ended if sampler_of(key, len(self.sockets)) == index)
            if rows or ended:
                ready = LogitsReady(
                    epoch=plan.epoch,
                    step=plan.step,
                    slot=plan.slot,
                    first_row=first_row,
                    rows=pack_i32(rows),
                    sample=tuple(plan.sample[row] for row in rows),
                    ended=ended,
                )
                self._send(index, ready)
            first_row += len(rows)

    def _send(self, index: int, message: Message) -> None:
        """Never blocks. A sampler that has taken nothing for thousands of messages is gone, and its
        successor's start voids what it missed."""
        try:
            self.sockets[index].send(encode(message), zmq.DONTWAIT)
        except zmq.Again:
            log.warning("sampler-%d takes no messages; dropped one", index)

    def close(self) -> None:
        for socket in self.sockets:
            socket.close()


def sampler_of(request: int, num_samplers: int) -> int:
    """The only sampler that keeps the rules of `request`."""
    return request % num_samplers
