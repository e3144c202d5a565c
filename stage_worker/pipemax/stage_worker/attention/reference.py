"""The plain form of paged attention: gather each request's context, softmax in float32.

Slow on purpose. Tests read the fast paths against it, and it can be switched on for an ablation.
"""

import numpy as np
import torch

from pipemax.stage_worker.batch import StepBatch


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
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    first_rows, row_counts, context_lens, tables, blocks = batch.runs
    columns = zip(first_rows, row_counts, context_lens, tables, strict=True)
    for first_row, count, context_len, table in columns:
        rows = slice(int(first_row), int(first_row + count))
        end = int(context_len + count)
        ids = torch.from_numpy(blocks[table : table - (-end // batch.block_size)].astype(np.int64))
        keys, values = gather(pool, layer, ids, end)
        group = query.shape[1] // keys.shape[0]
        keys = keys.float().repeat_interleave(group, dim=0)
        values = values.float().repeat_interleave(group, dim=0)
        scores = query[rows].transpose(0, 1).float() @ keys.transpose(1, 2) * scaling
        if softcap:
            scores = torch.tanh(scores / softcap) * softcap
        queries_at = torch.arange(int(context_len), end)[:, None]
        keys_at = torch.arange(end)[None]
        seen = keys_at <= queries_at
        if window:
            seen &= keys_at > queries_at - window
        weights = torch.softmax(scores.masked_fill(~seen, float("-inf")), dim=-1)
        out[rows] = (weights @ values).transpose(0, 1).to(out.dtype)
    return out


def gather(
    pool: torch.Tensor, layer: int, blocks: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V `[kv_heads, count, head_dim]` of the first `count` tokens in `blocks`, int64 ids."""
    taken = pool[blocks, layer]  # [blocks, 2, block_size, kv_heads, head_dim]
    both = taken.permute(1, 3, 0, 2, 4).flatten(2, 3)[:, :, :count]
    return both[0], both[1]
