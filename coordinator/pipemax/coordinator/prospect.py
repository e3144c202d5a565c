"""What it is decided by whether to decode on or to prefill, from the scheduler's state."""

from pipemax.coordinator.cost_model import StepFeatures
from pipemax.coordinator.phases import Prospect
from pipemax.coordinator.policy import SlotTarget
from pipemax.coordinator.state import SchedulerState


def prospect_of(state: SchedulerState, expected_tokens: int, target: SlotTarget) -> Prospect:
    """`expected_tokens`: prompt tokens that admission expects to find room for; `target`: an even
    share of those who decode. Steps of prompts only are predicted by the warm-up sweep, as none may
    have run for long."""
    admitted = sum(r.remaining for r in state.running.values() if r.remaining > 1)
    most_tokens = state.limits.max_num_batched_tokens
    decode = StepFeatures(target.requests, target.context_tokens)
    stage = state.costs.slowest(decode)
    prompts = StepFeatures(0, 0, most_tokens)
    return Prospect(
        decode_requests=target.requests,
        decode_step_s=stage.predict(decode) if stage else None,
        prefill_step_s=stage.predict_anywhere(prompts) if stage else None,
        prefill_steps=(admitted + expected_tokens) / most_tokens,
    )
