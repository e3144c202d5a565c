"""Step plans for tests."""

from collections.abc import Sequence
from typing import Any

import msgspec

from pipemax.proto.messages.control import SampleRow, StepPlan
from pipemax.proto.messages.types import pack_i32


def decode_plan(
    step: int, *, epoch: int = 1, slot: int = 0, rows: int = 1, wait_for_load: bool = False
) -> StepPlan:
    """`rows` requests with one block and one new token each, all of them sampled. Token ids are
    100, 101, ..."""
    return StepPlan(
        epoch=epoch,
        step=step,
        slot=slot,
        wait_for_load=wait_for_load,
        num_tokens=pack_i32([1] * rows),
        context_lens=pack_i32([3] * rows),
        block_counts=pack_i32([1] * rows),
        block_tables=pack_i32(range(rows)),
        token_ids=pack_i32(range(100, 100 + rows)),
        sample=tuple(greedy_row(item) for item in range(rows)),
    )


def plan_of(rows: Sequence[SampleRow], **fields: Any) -> StepPlan:
    """A plan that matters for nothing but its sample rows."""
    return msgspec.structs.replace(decode_plan(1), sample=tuple(rows), **fields)


def greedy_row(item: int, position: int = 0) -> SampleRow:
    return SampleRow(item, 0, position, 0.0, 0, 1.0, 0.0)
