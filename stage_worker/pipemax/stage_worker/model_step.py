"""A step of the real model: plan to inputs, inputs and activations to results."""

from pathlib import Path
from typing import cast

import torch

from pipemax.proto.errors import WireError
from pipemax.proto.messages.control import StepPlan
from pipemax.stage_worker.batch import StepBatch, prepare_batch
from pipemax.stage_worker.channels.ring import Rows
from pipemax.stage_worker.devices.base import Device
from pipemax.stage_worker.executor import StepResult
from pipemax.stage_worker.model.stage_model import StageModel
from pipemax.stage_worker.sampling import Sampler
from pipemax.stage_worker.sampling.logits_exit import LogitsExit


class ModelStep:
    """Implements `executor.StepWork` for one stage's model."""

    def __init__(
        self,
        model: StageModel,
        device: Device,
        num_blocks: int,
        tokenizer: Path | None = None,
        logits_exit: LogitsExit | None = None,
    ) -> None:
        """`num_blocks`: blocks of the pool that is bound to the model. tokenizer: see Sampler.
        logits_exit: to samplers; None where this stage samples itself."""
        self._model = model
        self._device = device
        self._num_blocks = num_blocks
        self._sampler = Sampler(tokenizer)
        self._logits_exit = logits_exit

    def prepare(self, plan: StepPlan) -> StepBatch:
        batch = prepare_batch(plan, self._model.geometry.block_size)
        if batch.max_block >= self._num_blocks:
            raise WireError(
                "bad_plan",
                f"step {plan.step} uses block {batch.max_block}; this pool has {self._num_blocks}",
            )
        return batch

    def await_rows(self, rows: Rows) -> None:
        """A CPU's rows are copied before they are announced."""

    def compute(self, plan: StepPlan, batch: StepBatch, rows: Rows | None) -> StepResult:
        """Sampling, or leaving logits to samplers, counts as computing: it is part of what makes
        the last stage's step longer."""
        output = self._model.forward(batch, cast(torch.Tensor | None, rows))
        self._device.synchronize()
        if not self._model.is_last:
            return StepResult(rows=output)
        if self._logits_exit is not None:
            sampled = self._logits_exit.take(plan, output)
        else:
            sampled = self._sampler.sample(plan, output)
        return StepResult(tokens=sampled.tokens, logprobs=sampled.logprobs, shares=sampled.shares)
