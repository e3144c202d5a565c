"""Turns a StepPlan into the tensors a step needs, once per step and without a loop over tokens."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from pipemax.proto.errors import WireError
from pipemax.proto.messages.control import StepPlan

I32Array = npt.NDArray[np.int32]
I64Array = npt.NDArray[np.int64]

# Below these, reading blocks in place once per token is faster than gathering the item's context
# for torch's attention (ops/benchmarks/results/attention-cpu.md).
_IN_PLACE_TOKENS = 8
_IN_PLACE_LEN = 64


@dataclass(frozen=True, slots=True)
class PrefillItem:
    """A request that brings so many tokens that gathering its context once pays."""

    first_row: int
    """Its first row among the step's tokens."""
    num_tokens: int
    context_len: int
    """Tokens already in the KV cache."""
    blocks: torch.Tensor
    """int64 [blocks]: device block ids covering context and new tokens."""


@dataclass(frozen=True, slots=True)
class StepBatch:
    """One step's inputs. Items are packed: their T tokens follow each other, without padding."""

    token_ids: torch.Tensor
    """int64 [1, T]"""
    position_ids: torch.Tensor
    """int64 [1, T]"""
    sample_rows: torch.Tensor
    """int64 [len(plan.sample)]: the row of each sampled item's last token."""
    slots: I64Array
    """[T] where each token's K and V go: block id · block_size + offset in the block."""
    block_tables: I32Array
    """[sum(block_counts)] device block ids, item after item."""
    paged_rows: I64Array
    """[R] rows whose attention reads the blocks in place: decodes and very small prefills."""
    paged_tables: I32Array
    """[R] where each row's item begins in `block_tables`."""
    paged_lens: I32Array
    """[R] tokens each row attends to, itself included."""
    prefills: tuple[PrefillItem, ...]
    block_size: int
    max_block: int
    """The largest block id in the step."""

    @property
    def num_tokens(self) -> int:
        return int(self.slots.shape[0])


def prepare_batch(plan: StepPlan, block_size: int) -> StepBatch:
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
    row_starts = row_ends - num_tokens
    tables = np.cumsum(block_counts, dtype=np.int64) - block_counts
    item_of_row = np.repeat(np.arange(num_tokens.shape[0]), num_tokens)
    positions = np.arange(token_ids.shape[0]) + (context_lens - row_starts)[item_of_row]
    in_table = tables[item_of_row] + positions // block_size
    slots = block_tables[in_table].astype(np.int64) * block_size + positions % block_size
    in_place = (num_tokens <= _IN_PLACE_TOKENS) | (context_lens + num_tokens <= _IN_PLACE_LEN)
    paged_rows = np.flatnonzero(in_place[item_of_row])
    return StepBatch(
        token_ids=torch.from_numpy(token_ids.astype(np.int64))[None],
        position_ids=torch.from_numpy(positions)[None],
        sample_rows=torch.from_numpy(row_ends[sampled] - 1),
        slots=slots,
        block_tables=block_tables,
        paged_rows=paged_rows,
        paged_tables=tables[item_of_row[paged_rows]].astype(np.int32),
        paged_lens=(positions[paged_rows] + 1).astype(np.int32),
        prefills=tuple(
            PrefillItem(
                first_row=int(row_starts[item]),
                num_tokens=int(num_tokens[item]),
                context_len=int(context_lens[item]),
                blocks=torch.from_numpy(
                    block_tables[tables[item] : tables[item] + block_counts[item]].astype(np.int64)
                ),
            )
            for item in np.flatnonzero(~in_place)
        ),
        block_size=block_size,
        max_block=int(block_tables.max()),
    )


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
