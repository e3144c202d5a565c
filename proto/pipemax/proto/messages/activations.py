"""Neighbouring stages (sockets `act-<receiver>`). Everything about the ring is agreed once."""

from typing import Literal

from pipemax.proto.memory import MemfdHandle
from pipemax.proto.messages.types import Count, Epoch, Message, ShortText, StepId


class RingOffer(Message, frozen=True, kw_only=True, tag="ring_offer"):
    """From the sender, on every Reset. Over TCP there is no `handle` and rows travel as a second
    frame of ActivationReady."""

    epoch: Epoch
    transport: Literal["shm", "tcp"]
    num_slots: Count
    max_rows: Count
    hidden_size: Count
    dtype: ShortText
    handle: MemfdHandle | None = None


class RingAccepted(Message, frozen=True, kw_only=True, tag="ring_accepted"):
    """The receiver maps the ring (or took note of the shapes) and waits for rows."""

    epoch: Epoch


class ActivationReady(Message, frozen=True, kw_only=True, tag="activation_ready"):
    """`rows` rows of `[hidden_size]` for `step` lie in ring slot `slot`."""

    epoch: Epoch
    step: StepId
    slot: Count
    rows: Count
