"""The columns of a StepPlan as arrays, checked against each other. Imports no torch."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipemax.proto.errors import WireError
from pipemax.proto.messages.control import StepPlan

I32Array = npt.NDArray[np.int32]
I64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class PlanColumns:
    """See StepPlan for the first five."""

    num_tokens: I32Array
    context_lens: I32Array
    block_counts: I32Array
    block_tables: I32Array
    token_ids: I32Array
    sampled: I64Array
    """[len(plan.sample)] the item after which each token is sampled."""
    sample_rows: I64Array
    """[len(plan.sample)] the row of the step's tokens whose logits are wanted."""
    row_ends: I64Array
    """[items] one past each item's last row among the step's tokens."""
    table_starts: I64Array
    """[items] where each item begins in `block_tables`."""
    item_of_row: I64Array
    """[T]"""
    positions: I64Array
    """[T] of each new token in its request."""
    slots: I64Array
    """[T] where each new token's KV goes: block id · block_size + offset in the block."""

    @property
    def row_starts(self) -> I64Array:
        return self.row_ends - self.num_tokens

    @property
    def max_block(self) -> int:
        """The largest block id in the step."""
        return int(self.block_tables.max())

    @property
    def max_token(self) -> int:
        """The largest token id in the step."""
        return int(self.token_ids.max())


def read_columns(plan: StepPlan, block_size: int) -> PlanColumns:
    """Raises WireError when the plan's columns contradict each other."""
    num_tokens = _column(plan.num_tokens, "num_tokens")
    context_lens = _column(plan.context_lens, "context_lens")
    block_counts = _column(plan.block_counts, "block_counts")
    block_tables = _column(plan.block_tables, "block_tables")
    token_ids = _column(plan.token_ids, "token_ids")
    sampled = np.fromiter((row.item for row in plan.sample), np.int64, len(plan.sample))
    _check(plan, num_tokens, context_lens, block_counts, block_tables, token_ids, sampled)
    _check_blocks(plan, num_tokens, context_lens, block_counts, block_size)
    row_ends = np.cumsum(num_tokens, dtype=np.int64)
    rows_back = _rows_back(plan, num_tokens, sampled)
    table_starts = np.cumsum(block_counts, dtype=np.int64) - block_counts
    item_of_row = np.repeat(np.arange(num_tokens.shape[0]), num_tokens)
    positions = np.arange(token_ids.shape[0]) + (context_lens - row_ends + num_tokens)[item_of_row]
    in_table = table_starts[item_of_row] + positions // block_size
    return PlanColumns(
        num_tokens,
        context_lens,
        block_counts,
        block_tables,
        token_ids,
        sampled,
        row_ends[sampled] - 1 - rows_back,
        row_ends,
        table_starts,
        item_of_row,
        positions,
        slots=block_tables[in_table].astype(np.int64) * block_size + positions % block_size,
    )


def _rows_back(plan: StepPlan, num_tokens: I32Array, sampled: I64Array) -> I64Array:
    """[len(plan.sample)]"""
    back = np.zeros(len(plan.sample), np.int64)
    for index, row in enumerate(plan.sample):
        if row.extras is not None:
            back[index] = row.extras.rows_back
    if back.any() and not ((back >= 0) & (back < num_tokens[sampled])).all():
        raise WireError("bad_plan", f"step {plan.step} samples rows outside of their items")
    return back


def _column(column: bytes, name: str) -> I32Array:
    if len(column) % 4:
        raise WireError("bad_plan", f"step plan: {name} is {len(column)} bytes, not 32-bit numbers")
    values = np.frombuffer(column, "<i4")
    if values.size and values.min() < 0:
        raise WireError("bad_plan", f"step plan: {name} holds {values.min()}")
    return values.astype(np.int32)  # a copy: writable, as the compiled kernels were compiled for


def _check(
    plan: StepPlan,
    num_tokens: I32Array,
    context_lens: I32Array,
    block_counts: I32Array,
    block_tables: I32Array,
    token_ids: I32Array,
    sampled: I64Array,
) -> None:
    items = num_tokens.shape[0]
    if items == 0:
        raise WireError("bad_plan", f"step {plan.step} has no items")
    if context_lens.shape[0] != items or block_counts.shape[0] != items:
        raise WireError(
            "bad_plan",
            f"step {plan.step}: {items} num_tokens, {context_lens.shape[0]} context_lens and "
            f"{block_counts.shape[0]} block_counts",
        )
    if num_tokens.min() < 1:
        raise WireError("bad_plan", f"step {plan.step} has an item without tokens")
    if num_tokens.sum(dtype=np.int64) != token_ids.shape[0]:
        raise WireError(
            "bad_plan",
            f"step {plan.step}: num_tokens sum to {num_tokens.sum(dtype=np.int64)}, "
            f"{token_ids.shape[0]} token_ids are there",
        )
    if block_counts.sum(dtype=np.int64) != block_tables.shape[0]:
        raise WireError(
            "bad_plan",
            f"step {plan.step}: block_counts sum to {block_counts.sum(dtype=np.int64)}, "
            f"{block_tables.shape[0]} block ids are there",
        )
    if sampled.size and (sampled.min() < 0 or sampled.max() >= items):
        raise WireError(
            "bad_plan", f"step {plan.step} samples after items it does not have ({items} items)"
        )


def _check_blocks(
    plan: StepPlan,
    num_tokens: I32Array,
    context_lens: I32Array,
    block_counts: I32Array,
    block_size: int,
) -> None:
    capacity = block_counts.astype(np.int64) * block_size
    needed = context_lens.astype(np.int64) + num_tokens
    short = np.flatnonzero(capacity < needed)
    if short.size:
        item = short[0]
        raise WireError(
            "bad_plan",
            f"step {plan.step}: item {item} has {needed[item]} tokens and "
            f"{block_counts[item]} blocks of {block_size}",
        )
