"""Turns a StepPlan into the tensors a step needs, once per step and without a loop over tokens."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from pipemax.proto.messages.control import StepPlan
from pipemax.stage_worker.plan_columns import I32Array, I64Array, PlanColumns, read_columns

_RUN_ROWS = 32
"""New tokens of one request that are attended to together: K and V are packed once for them, and
what they add up stays in the cache."""


class Runs(NamedTuple):
    """Runs of new tokens of one request each, as the attention kernels take them."""

    first_rows: I64Array
    """Each run's first row among the step's tokens."""
    row_counts: I32Array
    context_lens: I32Array
    """Tokens of the request before the run."""
    tables: I32Array
    """Where the request begins in `blocks`."""
    blocks: I32Array
    """Device block ids, request after request."""


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
    runs: Runs
    """Every row of the step is in one."""
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
    return StepBatch(
        token_ids=torch.from_numpy(columns.token_ids.astype(np.int64))[None],
        position_ids=torch.from_numpy(columns.positions)[None],
        sample_rows=torch.from_numpy(columns.sample_rows),
        slots=columns.slots,
        runs=_runs(columns),
        block_size=block_size,
        max_block=columns.max_block,
        max_token=columns.max_token,
    )


def _runs(columns: PlanColumns) -> Runs:
    parts = -(-columns.num_tokens // _RUN_ROWS)
    item = np.repeat(np.arange(parts.shape[0]), parts)
    # How many rows of the item come before each of its runs.
    before = (np.arange(item.shape[0]) - (np.cumsum(parts) - parts)[item]) * _RUN_ROWS
    return Runs(
        first_rows=columns.row_starts[item] + before,
        row_counts=np.minimum(columns.num_tokens[item] - before, _RUN_ROWS).astype(np.int32),
        context_lens=(columns.context_lens[item] + before).astype(np.int32),
        tables=columns.table_starts[item].astype(np.int32),
        blocks=columns.block_tables,
    )
