"""Attention of an item that brings several tokens: its context is gathered once per layer, and
torch's attention runs over it. The copy costs little beside the many queries that read it."""

import torch
from torch.nn.functional import scaled_dot_product_attention

from pipemax.stage_worker.batch import PrefillItem

_SOFTCAP_ROWS = 128
"""Queries at a time where scores must be held in memory: `[heads, rows, context]` float32."""


def first_block(item: PrefillItem, window: int, block_size: int) -> int:
    """The first block of the item that any of its new tokens can see. `window` 0 is no window."""
    return max(0, item.context_len + 1 - window) // block_size if window else 0


def visible(item: PrefillItem, window: int, block_size: int) -> torch.Tensor | None:
    """bool `[num_tokens, keys]`: which keys each new token sees, keys counted from the first
    visible block. None when that is plainly causal from the first token on."""
    end = item.context_len + item.num_tokens
    if item.context_len == 0 and (window == 0 or window >= end):
        return None
    queries = torch.arange(item.context_len, end)[:, None]
    keys = torch.arange(first_block(item, window, block_size) * block_size, end)[None]
    seen = keys <= queries
    return seen & (keys > queries - window) if window else seen


def gather(
    pool: torch.Tensor, layer: int, item: PrefillItem, first: int, block_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V `[kv_heads, keys, head_dim]` of an item from its block `first` on."""
    end = item.context_len + item.num_tokens
    blocks = item.blocks[first : -(-end // block_size)]
    taken = pool[blocks, layer]  # [blocks, 2, block_size, kv_heads, head_dim]
    both = taken.permute(1, 3, 0, 2, 4).flatten(2, 3)[:, :, : end - first * block_size]
    return both[0], both[1]


def prefill(
    pool: torch.Tensor,
    layer: int,
    item: PrefillItem,
    query: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    scaling: float,
    softcap: float,
    window: int,
    block_size: int,
) -> torch.Tensor:
    """`[num_tokens, heads, head_dim]` for `query` of the same shape; `mask` from `visible`."""
    keys, values = gather(pool, layer, item, first_block(item, window, block_size), block_size)
    heads_first = query.transpose(0, 1)
    if softcap:
        return _softcapped(heads_first, keys, values, mask, scaling, softcap).transpose(0, 1)
    return scaled_dot_product_attention(
        heads_first[None],
        keys[None],
        values[None],
        attn_mask=mask,
        is_causal=mask is None,
        scale=scaling,
        enable_gqa=keys.shape[0] != heads_first.shape[0],
    )[0].transpose(0, 1)


def _softcapped(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    softcap: float,
) -> torch.Tensor:
    """torch's attention has no soft-cap: scores are formed here, some queries at a time."""
    heads, num_tokens, head_dim = query.shape
    grouped = query.reshape(keys.shape[0], -1, num_tokens, head_dim)
    if mask is None:
        mask = torch.ones(num_tokens, keys.shape[1], dtype=torch.bool).tril()
    out = torch.empty_like(grouped)
    for start in range(0, num_tokens, _SOFTCAP_ROWS):
        rows = slice(start, start + _SOFTCAP_ROWS)
        scores = grouped[:, :, rows] @ keys[:, None].transpose(2, 3) * scaling
        scores = torch.tanh(scores / softcap) * softcap
        scores = scores.masked_fill(~mask[rows], float("-inf"))
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
        out[:, :, rows] = weights @ values[:, None]
    return out.reshape(heads, num_tokens, head_dim)
