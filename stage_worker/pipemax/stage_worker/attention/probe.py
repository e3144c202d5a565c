"""The smallest step that calls for every kernel."""

from pipemax.proto.messages.control import SampleRow, StepPlan
from pipemax.proto.messages.types import pack_i32


def probe_plan() -> StepPlan:
    """A decode and a prompt of two tokens, all in block 0: devices have a kernel for each."""
    return StepPlan(
        epoch=0,
        step=0,
        slot=0,
        wait_for_load=False,
        num_tokens=pack_i32([1, 2]),
        context_lens=pack_i32([0, 0]),
        block_counts=pack_i32([1, 2]),
        block_tables=pack_i32([0, 0, 0]),
        token_ids=pack_i32([0, 0, 0]),
        sample=(SampleRow(0, 0, 0, 0.0, 0, 1.0, 0.0),),
    )
