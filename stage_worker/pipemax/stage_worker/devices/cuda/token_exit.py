"""From logits to tokens, as far as the GPU does it, and the way of both to the host.

Plain greedy rows are answered by the device: only token ids travel. All others send their logits
to pinned memory. There a `Sampler` draws once the step has ended; or, where there are sampler
workers, that memory is the ring which they read. Both travel on a stream of their own: on the
kernels' they would wait for their turn among the KV on the link.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch

from pipemax.proto.cuda.runtime import CudaEvent, Pointer, Stream
from pipemax.proto.messages.control import NO_TOKEN, RowLogprobs, StepPlan
from pipemax.stage_worker.channels.logits import LogitsPlace, LogitsShape, Shares
from pipemax.stage_worker.devices.cuda.buffers import DeviceBuffer, Gpu, PinnedBuffer
from pipemax.stage_worker.devices.cuda.inputs import SampleInputs
from pipemax.stage_worker.sampling import Sampled, Sampler

_DRAW_BUFFERS: Final = 2
"""The host draws from one while the next step's logits arrive in the other."""
_NEVER: Final = float("-inf")


@dataclass(frozen=True, slots=True)
class TokenBuffer:
    """Where one step's token ids are picked and arrive."""

    device: DeviceBuffer
    pinned: PinnedBuffer
    picked: CudaEvent


@dataclass(frozen=True, slots=True)
class PendingTokens:
    """A step's tokens, on their way."""

    buffer: TokenBuffer
    drawn_rows: tuple[int, ...]
    logits: PinnedBuffer | None
    """Of `drawn_rows`, in order; None where there are none, or samplers draw."""
    shares: Shares = ()


class TokenExit:
    """Of the last stage. One step after the other: `ready`, kernels, `take`; then `tokens` once the
    step has ended."""

    def __init__(
        self,
        gpu: Gpu,
        *,
        max_rows: int,
        vocab_size: int,
        steps: int,
        tokenizer: Path | None = None,
        num_samplers: int = 0,
        ring: LogitsShape | None = None,
    ) -> None:
        """`steps`: that may be under way at once. tokenizer: see Sampler. `ring`: of `num_samplers`
        workers."""
        runtime = self._runtime = gpu.runtime
        self._torch = gpu.torch
        self._max_rows = max_rows
        self._vocab_size = vocab_size
        self.stream = runtime.create_stream(urgent=True)
        """Behind what is on this stream now, all results so far are with the host."""
        ids_bytes, logits_bytes = 8 * max_rows, 4 * max_rows * vocab_size
        self._buffers = [
            TokenBuffer(
                DeviceBuffer(gpu, ids_bytes),
                PinnedBuffer.create(runtime, "pipemax-tokens", ids_bytes),
                runtime.create_event(),
            )
            for _ in range(steps)
        ]
        self._drawn = DeviceBuffer(gpu, logits_bytes)
        self._sent = runtime.create_event()
        """Behind the last copy out of `_drawn`."""
        self._logits = [
            PinnedBuffer.create(runtime, "pipemax-logits", logits_bytes)
            for _ in range(0 if ring else _DRAW_BUFFERS)
        ]
        self.num_samplers = num_samplers
        self._ring: PinnedBuffer | None = None
        self.place: LogitsPlace | None = None
        if ring is not None:
            self._ring = PinnedBuffer.create(runtime, "pipemax-logits", ring.size_bytes)
            self.place = LogitsPlace(self._ring.handle, ring)
        self._sampler = Sampler(tokenizer)
        self._free_buffers = list(self._buffers)
        self._free_logits = list(self._logits)

    def ready(self, inputs: SampleInputs) -> bool:
        """There is a place for the logits of a step that is drawn from. A slot's entry in the ring
        is free whenever a step of that slot is planned."""
        return not inputs.drawn_rows or self._ring is not None or bool(self._free_logits)

    def take(
        self,
        inputs: SampleInputs,
        num_rows: int,
        logits: Callable[[], torch.Tensor],
        compute: Stream,
        slot: int,
    ) -> PendingTokens:
        """Queues the way from `logits`, float32 `[at least num_rows, vocab]`, which the kernels
        queued before will have made, to tokens. They are changed. `slot`: the step's."""
        runtime, buffer = self._runtime, self._free_buffers.pop()
        num_drawn = len(inputs.drawn_rows)
        if num_drawn:
            runtime.wait(compute, self._sent)
        ids = buffer.device.tensor((num_rows,), torch.int64)
        drawn = self._drawn.tensor((num_drawn, self._vocab_size), torch.float32)

        def pick() -> None:
            with torch.inference_mode():
                rows = logits()[:num_rows]
                if inputs.banned is not None:
                    rows.view(-1).index_fill_(0, inputs.banned, _NEVER)
                ids.copy_(rows.argmax(dim=-1))  # the first of equal ones, on a GPU as well
                if inputs.drawn is not None:
                    torch.index_select(rows, 0, inputs.drawn, out=drawn)

        self._torch.launch(compute, pick)
        runtime.record(buffer.picked, compute)
        runtime.wait(self.stream, buffer.picked)
        runtime.copy(buffer.pinned.pointer, buffer.device.pointer, 8 * num_rows, self.stream)
        if not num_drawn:
            return PendingTokens(buffer, (), None)
        arriving = None if self._ring is not None else self._free_logits.pop()
        size_bytes = 4 * num_drawn * self._vocab_size
        target = self._entry(slot) if arriving is None else arriving.pointer
        runtime.copy(target, self._drawn.pointer, size_bytes, self.stream)
        runtime.record(self._sent, self.stream)
        return PendingTokens(buffer, inputs.drawn_rows, arriving, inputs.shares)

    def _entry(self, slot: int) -> Pointer:
        """Of the ring."""
        assert self._ring is not None
        assert self.place is not None
        return Pointer(self._ring.pointer + slot * self.place.shape.entry_bytes)

    def tokens(self, pending: PendingTokens, plan: StepPlan) -> Sampled:
        """One per sample row, and what was asked for beside them. The step has ended."""
        logprobs: tuple[RowLogprobs, ...] = ()
        count = len(plan.sample)
        tokens: list[int] = pending.buffer.pinned.bytes.view(np.int64)[:count].tolist()
        if pending.logits is not None:
            count = len(pending.drawn_rows)
            logits = pending.logits.bytes.view(np.float32)[: count * self._vocab_size]
            drawn = self._sampler.sample(
                plan,
                torch.from_numpy(logits.reshape(count, self._vocab_size)),
                pending.drawn_rows,
            )
            for index, token in zip(pending.drawn_rows, drawn.tokens, strict=True):
                tokens[index] = token
            logprobs = drawn.logprobs
        elif pending.shares:
            for index in pending.drawn_rows:
                tokens[index] = NO_TOKEN
        self.forget(pending)
        return Sampled(tokens, logprobs, pending.shares)

    def note_ended(self, plan: StepPlan) -> None:
        """For this process's own sampler, which a step without drawn rows does not ask."""
        if plan.ended:
            self._sampler.sample(plan, torch.empty(0, self._vocab_size), ())

    def forget(self, pending: PendingTokens) -> None:
        """The step has ended, and nobody wants its tokens any more."""
        self._free_buffers.append(pending.buffer)
        if pending.logits is not None:
            self._free_logits.append(pending.logits)

    def free(self) -> None:
        """The GPU has nothing queued."""
        for buffer in self._buffers:
            buffer.device.close()
            buffer.pinned.close()
            self._runtime.destroy_event(buffer.picked)
        self._drawn.close()
        for logits in self._logits:
            logits.close()
        if self._ring is not None:
            self._ring.close()
        self._runtime.destroy_event(self._sent)
        self._runtime.destroy_stream(self.stream)
