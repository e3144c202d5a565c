"""A sampler worker's core: what is said to it goes in, what it answers comes out. No sockets, no
clock; it reads the logits where the last stage left them."""

import logging

import numpy as np
import numpy.typing as npt
import torch

from pipemax.proto.errors import PipemaxSystemError, WireError
from pipemax.proto.memory import MemfdHandle, SharedMemory
from pipemax.proto.messages.control import RowsSampled
from pipemax.proto.messages.logits import LogitsAccepted, LogitsOffer, LogitsReady
from pipemax.proto.messages.types import pack_i32, unpack_i32
from pipemax.stage_worker.channels.logits import LogitsShape
from pipemax.stage_worker.sampling.sampler import Sampler

log = logging.getLogger(__name__)


class LogitsRing:
    """The last stage's ring, mapped."""

    def __init__(self, handle: MemfdHandle, shape: LogitsShape) -> None:
        """Raises PipemaxSystemError when the stage is gone, WireError when the memory is smaller
        than `shape`."""
        if shape.size_bytes > handle.size_bytes:
            raise WireError("invalid_field", f"{shape} in memory of {handle.size_bytes} bytes")
        self.handle = handle
        self.shape = shape
        self._memory = SharedMemory.open(handle)
        flat = np.frombuffer(self._memory.buffer, np.float32)[: shape.size_bytes // 4]
        self._entries: npt.NDArray[np.float32] = flat.reshape(
            shape.num_slots, shape.max_rows, shape.vocab_size
        )

    def rows(self, slot: int, first: int, count: int) -> torch.Tensor:
        """float32 `[count, vocab]`, in place."""
        if slot >= self.shape.num_slots or first + count > self.shape.max_rows:
            raise WireError("invalid_field", f"rows {first}+{count} of {slot} in {self.shape}")
        return torch.from_numpy(self._entries[slot, first : first + count])

    def close(self) -> None:
        del self._entries
        self._memory.close()


class SamplerWorker:
    """Samples its share of each step. Whatever is not of the present epoch is void."""

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler
        self.epoch = -1
        """-1 before the first reset."""
        self._offer: LogitsOffer | None = None
        self._ring: LogitsRing | None = None
        self._agreed = False

    def reset(self, epoch: int) -> LogitsAccepted | None:
        """Forgets everything about requests. Answers an offer for `epoch` that was faster than the
        reset."""
        self.epoch = epoch
        self._agreed = False
        self._sampler.forget_all()
        return self._accept()

    def offered(self, offer: LogitsOffer) -> LogitsAccepted | None:
        """The same offer again means that the answer was lost."""
        self._offer = offer
        return self._accept()

    def sample(self, ready: LogitsReady) -> RowsSampled | None:
        """None where there is nothing to answer. Raises WireError when the message contradicts
        itself or what was agreed, InvariantError when it does so with what was sampled before."""
        if ready.epoch != self.epoch:
            return None
        if self._ring is None or not self._agreed:
            raise WireError("too_early", f"step {ready.step} was sent before the ring was agreed")
        rows = unpack_i32(ready.rows)
        if len(rows) != len(ready.sample):
            raise WireError("invalid_field", f"{len(ready.sample)} sample rows for {len(rows)}")
        self._sampler.forget(ready.ended)
        if not rows:
            return None
        logits = self._ring.rows(ready.slot, ready.first_row, len(rows))
        sampled = self._sampler.sample_rows(ready.sample, logits, rows)
        return RowsSampled(
            epoch=ready.epoch,
            step=ready.step,
            rows=ready.rows,
            tokens=pack_i32(sampled.tokens),
            logprobs=sampled.logprobs,
        )

    def _accept(self) -> LogitsAccepted | None:
        """An older offer is void, a newer one waits for our own reset."""
        offer = self._offer
        if offer is None or offer.epoch != self.epoch:
            return None
        shape = LogitsShape(offer.num_slots, offer.max_rows, offer.vocab_size)
        if self._ring is None or self._ring.handle != offer.handle or self._ring.shape != shape:
            self.close()
            try:
                self._ring = LogitsRing(offer.handle, shape)
            except PipemaxSystemError as error:
                log.warning("cannot map the ring of the last stage: %s", error)
                return None
        self._agreed = True
        return LogitsAccepted(epoch=self.epoch)

    def close(self) -> None:
        self._agreed = False
        if self._ring is not None:
            self._ring.close()
            self._ring = None
