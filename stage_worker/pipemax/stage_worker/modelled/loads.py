"""What a step's time depends on, and what a warm-up sweep would measure."""

from typing import Protocol

from pipemax.proto.messages.control import StepPlan, SweepSample
from pipemax.proto.messages.types import unpack_i32
from pipemax.stage_worker.modelled.roofline import StepLoad
from pipemax.stage_worker.sweep import SweepLimits, sweep_shapes


class StepCost(Protocol):
    """Whatever says how long a step takes: the roofline, or costs measured elsewhere."""

    def step_s(self, load: StepLoad) -> float:
        """Compute time of one step, in seconds."""


def load_of(plan: StepPlan) -> StepLoad:
    """Rows and context of a plan. An item of one token decodes, one of more is a prompt chunk."""
    counts = unpack_i32(plan.num_tokens)
    starts = unpack_i32(plan.context_lens)
    decode_context = pairs = prefill_context = prefill_rows = 0
    for count, start in zip(counts, starts, strict=True):
        if count == 1:
            decode_context += start + 1
        else:
            prefill_rows += count
            prefill_context += start
            pairs += count * start + count * (count + 1) // 2
    return StepLoad(
        sum(counts) - prefill_rows, decode_context, prefill_rows, pairs, prefill_context
    )


def modelled_sweep(model: StepCost, limits: SweepLimits) -> tuple[SweepSample, ...]:
    """What a stage's warm-up sweep measures, of a stage that takes exactly as long as modelled."""
    samples = []
    for shape in sweep_shapes(limits):
        if shape.is_decode:
            load = StepLoad(shape.rows, shape.pairs)
        else:
            context = shape.items * shape.context_len
            load = StepLoad(0, 0, shape.rows, shape.pairs, context)
        samples.append(shape.sample(model.step_s(load)))
    return tuple(samples)
