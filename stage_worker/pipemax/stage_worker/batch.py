"""Turns a StepPlan into the tensors a step needs, once per step and without a loop over tokens."""

from dataclasses import dataclass

import numpy as np
import torch

from pipemax.proto.messages.control import StepPlan
from pipemax.stage_worker.plan_columns import I32Array, I64Array, read_columns

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
    max_token: int
    """The largest token id."""

    @property
    def num_tokens(self) -> int:
        return int(self.slots.shape[0])


def prepare_batch(plan: StepPlan, block_size: int) -> StepBatch:
    """Raises WireError when the plan's columns contradict each other."""
    columns = read_columns(plan, block_size)
    num_tokens, context_lens = columns.num_tokens, columns.context_lens
    tables, block_tables = columns.table_starts, columns.block_tables
    in_place = (num_tokens <= _IN_PLACE_TOKENS) | (context_lens + num_tokens <= _IN_PLACE_LEN)
    paged_rows = np.flatnonzero(in_place[columns.item_of_row])
    return StepBatch(
        token_ids=torch.from_numpy(columns.token_ids.astype(np.int64))[None],
        position_ids=torch.from_numpy(columns.positions)[None],
        sample_rows=torch.from_numpy(columns.sample_rows),
        slots=columns.slots,
        block_tables=block_tables,
        paged_rows=paged_rows,
        paged_tables=tables[columns.item_of_row[paged_rows]].astype(np.int32),
        paged_lens=(columns.positions[paged_rows] + 1).astype(np.int32),
        prefills=tuple(
            PrefillItem(
                first_row=int(columns.row_starts[item]),
                num_tokens=int(num_tokens[item]),
                context_len=int(context_lens[item]),
                blocks=torch.from_numpy(
                    block_tables[tables[item] : tables[item] + columns.block_counts[item]].astype(
                        np.int64
                    )
                ),
            )
            for item in np.flatnonzero(~in_place)
        ),
        block_size=block_size,
        max_block=columns.max_block,
        max_token=columns.max_token,
    )
