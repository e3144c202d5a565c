"""The plain form of paged attention: gather each request's context, softmax in float32.

Slow on purpose. Tests read the fast paths against it, and it can be switched on for an ablation.
"""

import numpy as np
import torch

from pipemax.stage_worker.attention.prefill import gather
from pipemax.stage_worker.batch import PrefillItem, StepBatch


def reference_attention(
    pool: torch.Tensor,
    layer: int,
    batch: StepBatch,
    query: torch.Tensor,
    *,
    scaling: float,
    softcap: float,
    window: int,
) -> torch.Tensor:
    """`[T, heads, head_dim]` for `query` of the same shape. K and V of the step are in the pool."""
    out = torch.empty_like(query)
    for item in _all_items(batch):
        rows = slice(item.first_row, item.first_row + item.num_tokens)
        keys, values = gather(pool, layer, item, 0, batch.block_size)
        group = query.shape[1] // keys.shape[0]
        keys = keys.float().repeat_interleave(group, dim=0)
        values = values.float().repeat_interleave(group, dim=0)
        scores = query[rows].transpose(0, 1).float() @ keys.transpose(1, 2) * scaling
        if softcap:
            scores = torch.tanh(scores / softcap) * softcap
        queries_at = torch.arange(item.context_len, item.context_len + item.num_tokens)[:, None]
        keys_at = torch.arange(keys.shape[1])[None]
        seen = keys_at <= queries_at
        if window:
            seen &= keys_at > queries_at - window
        weights = torch.softmax(scores.masked_fill(~seen, float("-inf")), dim=-1)
        out[rows] = (weights @ values).transpose(0, 1).to(out.dtype)
    return out


def _all_items(batch: StepBatch) -> list[PrefillItem]:
    """Rows attended to in place, each as an item of its own, and the others."""
    rows = [
        PrefillItem(
            first_row=int(row),
            num_tokens=1,
            context_len=int(length) - 1,
            blocks=torch.from_numpy(
                batch.block_tables[table : table + -(-length // batch.block_size)].astype(np.int64)
            ),
        )
        for row, table, length in zip(
            batch.paged_rows, batch.paged_tables, batch.paged_lens, strict=True
        )
    ]
    return [*rows, *batch.prefills]
