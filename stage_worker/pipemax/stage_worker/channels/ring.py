"""What sender and receiver agree on, whatever carries the rows."""

from dataclasses import dataclass

from pipemax.proto.geometry import DTYPE_BYTES, Dtype
from pipemax.proto.messages.activations import RingOffer


@dataclass(frozen=True, slots=True)
class RingShape:
    """`[num_slots, max_rows, hidden_size]`, one slot per micro-batch, one row per token."""

    num_slots: int
    max_rows: int
    hidden_size: int
    dtype: Dtype

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.num_slots, self.max_rows, self.hidden_size)

    @property
    def row_bytes(self) -> int:
        return self.hidden_size * DTYPE_BYTES[self.dtype]

    def difference(self, offer: RingOffer) -> str | None:
        """The first thing in which `offer` is not this shape, in words; None when it is."""
        for name in ("num_slots", "max_rows", "hidden_size", "dtype"):
            offered, expected = getattr(offer, name), getattr(self, name)
            if offered != expected:
                return f"{name} is {offered} there and {expected} here"
        return None
