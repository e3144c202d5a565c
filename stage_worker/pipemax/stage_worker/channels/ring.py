"""What sender and receiver agree on, whatever carries the rows and whatever the rows are made of.

Imports no torch: a stage that only models its GPU has none.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import zmq

from pipemax.proto.geometry import DTYPE_BYTES, Dtype
from pipemax.proto.memory import MemfdHandle
from pipemax.proto.messages.activations import ActivationReady, CudaRing, RingOffer

Transport = Literal["ipc", "shm", "tcp"]
Frames = tuple[memoryview, ...]
RingDtype = Dtype | Literal["uint64"]


@dataclass(frozen=True, slots=True)
class RingShape:
    """`[num_slots, max_rows, hidden_size]`, one slot per micro-batch, one row per token."""

    num_slots: int
    max_rows: int
    hidden_size: int
    dtype: RingDtype

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.num_slots, self.max_rows, self.hidden_size)

    @property
    def row_bytes(self) -> int:
        return self.hidden_size * (8 if self.dtype == "uint64" else DTYPE_BYTES[self.dtype])

    @property
    def size_bytes(self) -> int:
        return self.num_slots * self.max_rows * self.row_bytes

    def difference(self, offer: RingOffer) -> str | None:
        """The first thing in which `offer` is not this shape, in words; None when it is."""
        for name in ("num_slots", "max_rows", "hidden_size", "dtype"):
            offered, expected = getattr(offer, name), getattr(self, name)
            if offered != expected:
                return f"{name} is {offered} there and {expected} here"
        return None


class Rows(Protocol):
    """Output of a step, `[rows, hidden]`: an array of the device that made it. Whoever carries it
    looks at its shape only."""

    @property
    def shape(self) -> Sequence[int]: ...

    def __len__(self) -> int: ...


class FrameSlots(Protocol):
    """`[num_slots, max_rows, hidden]` that frames are received into."""

    def read(self, slot: int, count: int) -> Rows:
        """The first `count` rows of `slot`, in place."""

    def frame(self, slot: int, count: int) -> memoryview:
        """The bytes of the same rows, writable."""

    def close(self) -> None: ...


class Ring(FrameSlots, Protocol):
    """The same in memory that other processes can map."""

    @property
    def handle(self) -> MemfdHandle:
        """Opens the same memory in another process while this one lives."""

    def write(self, slot: int, rows: Rows) -> None:
        """Copies `rows` to the beginning of `slot`."""


@dataclass(frozen=True, slots=True)
class RingPlace:
    """What a RingOffer says of where the ring is. Over TCP: nothing."""

    handle: MemfdHandle | None = None
    cuda: CudaRing | None = None


@dataclass(frozen=True, slots=True)
class Written:
    """How rows are on their way."""

    frames: Frames = ()
    """Has to travel in the message itself."""
    event: int = -1
    """See ActivationReady."""


class RowWriter(Protocol):
    """How rows leave this process."""

    @property
    def transport(self) -> Transport: ...

    def place(self) -> RingPlace:
        """Where the receiver finds them, when rows travel through memory."""

    def write(self, slot: int, rows: Rows) -> Written:
        """Puts `rows` into `slot`, whose memory must not change until the slot's next step."""

    def reconnect(self, socket: zmq.Socket[bytes]) -> None:
        """Makes sure the socket leads to the receiver that lives now."""

    def close(self) -> None: ...


class RowReader(Protocol):
    """How rows enter this process."""

    @property
    def transport(self) -> Transport: ...

    def attach(self, offer: RingOffer) -> None:
        """Gets at the sender's memory. Raises PipemaxSystemError when the sender is gone."""

    def read(self, ready: ActivationReady, extra: Sequence[zmq.Frame]) -> Rows:
        """The rows `ready` announces. Raises WireError when `extra` does not hold them."""

    def close(self) -> None: ...


class RingMemory(Protocol):
    """What the channels need of a device."""

    def transport(self, wanted: Literal["auto"] | Transport, sender: int) -> Transport:
        """How rows travel from stage `sender` to the next: to both the same. Raises ConfigError
        when `wanted` cannot be."""

    def row_writer(self, transport: Transport, shape: RingShape) -> RowWriter:
        """For rows that travel through memory."""

    def row_reader(self, transport: Transport, shape: RingShape) -> RowReader: ...

    def allocate_ring(self, shape: RingShape) -> FrameSlots:
        """New ones of this process, for `tcp`."""

    def frame(self, rows: Rows) -> memoryview:
        """The bytes of `rows`, one after the other; in place where they lie like that."""


class SharedRings(Protocol):
    """What `shm` needs of a device whose rows lie in host memory."""

    def allocate_ring(self, shape: RingShape) -> Ring: ...

    def open_ring(self, handle: MemfdHandle, shape: RingShape) -> Ring:
        """A ring that a process of this machine allocated. Raises PipemaxSystemError when that
        process is gone."""
