"""From logits to tokens on a last stage without a GPU that has sampler workers."""

import numpy as np
import torch

from pipemax.proto.errors import InvariantError
from pipemax.proto.memory import SharedMemory
from pipemax.proto.messages.control import NO_TOKEN, StepPlan
from pipemax.stage_worker.channels.logits import LogitsPlace, LogitsShape
from pipemax.stage_worker.sampling.draw import is_plain_greedy, sample
from pipemax.stage_worker.sampling.sampler import Sampled
from pipemax.stage_worker.sampling.shares import share_out


class LogitsExit:
    """Owns the ring.

    Plain greedy rows are answered here, as a GPU does it: to find the largest of a row of logits
    costs less than to copy the row (half as much, for vocabularies of 32,000 and of 128,000).
    """

    def __init__(self, shape: LogitsShape, num_samplers: int) -> None:
        """The memory's pages are taken as steps come to use them: rarely does a step sample as
        many rows as it may."""
        self._num_samplers = num_samplers
        self._memory = SharedMemory.create("pipemax-logits", shape.size_bytes)
        self.place = LogitsPlace(self._memory.handle, shape)
        flat = torch.from_numpy(np.frombuffer(self._memory.buffer, np.float32))
        self._ring = flat[: shape.size_bytes // 4].view(
            shape.num_slots, shape.max_rows, shape.vocab_size
        )

    def take(self, plan: StepPlan, logits: torch.Tensor) -> Sampled:
        """`logits` float32 `[len(plan.sample), vocab]`. Those of `shares` lie in the ring when it
        returns. Raises InvariantError when they are more rows than an entry has."""
        rows = plan.sample
        away = [index for index, row in enumerate(rows) if not is_plain_greedy(row)]
        if not away:
            return Sampled(sample(logits, rows))
        shares = share_out(rows, away, self._num_samplers)
        order = [row for share in shares for row in share]
        if len(order) > self.place.shape.max_rows:
            raise InvariantError(f"{len(order)} rows to sample in {self.place.shape}")
        entry = self._ring[plan.slot, : len(order)]
        torch.index_select(logits, 0, torch.tensor(order), out=entry)
        tokens = [NO_TOKEN] * len(rows)
        here = [index for index, row in enumerate(rows) if is_plain_greedy(row)]
        if here:
            picked = sample(logits[here], [rows[index] for index in here])
            for index, token in zip(here, picked, strict=True):
                tokens[index] = token
        return Sampled(tokens, shares=shares)

    def close(self) -> None:
        del self._ring
        self._memory.close()
