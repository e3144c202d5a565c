"""Neighbouring stages (sockets `act-<receiver>`). Everything about the ring is agreed once."""

from typing import Literal

import msgspec

from pipemax.proto.memory import MemfdHandle
from pipemax.proto.messages.kv import Events, IpcHandle
from pipemax.proto.messages.types import Count, Epoch, Message, ShortText, StepId


class CudaRing(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An activation ring on a GPU, or the events of one in shared memory that GPUs copy to."""

    memory: IpcHandle | None
    """None: the ring is the offer's `handle`, pinned on both sides."""
    pci_bus_id: ShortText
    """Of the sender's GPU."""
    written: Events
    """Recorded by the sender behind the rows of each step; numbered by ActivationReady.event."""


class RingOffer(Message, frozen=True, kw_only=True, tag="ring_offer"):
    """From the sender, on every Reset. Over TCP there is no `handle` and rows travel as a second
    frame of ActivationReady."""

    epoch: Epoch
    transport: Literal["shm", "tcp", "ipc"]
    num_slots: Count
    max_rows: Count
    hidden_size: Count
    dtype: ShortText
    handle: MemfdHandle | None = None
    cuda: CudaRing | None = None
    """Between stages on GPUs, over `ipc` and `shm`."""


class RingAccepted(Message, frozen=True, kw_only=True, tag="ring_accepted"):
    """The receiver maps the ring (or took note of the shapes) and waits for rows."""

    epoch: Epoch


class ActivationReady(Message, frozen=True, kw_only=True, tag="activation_ready"):
    """`rows` rows of `[hidden_size]` for `step` lie in ring slot `slot`."""

    epoch: Epoch
    step: StepId
    slot: Count
    rows: Count
    event: int = -1
    """Recorded behind the rows; -1: they are there. Counts up over the life of the sender."""
