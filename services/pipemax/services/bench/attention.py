"""Ways to attend over the paged pool on a CPU. Imports torch: for programs of their own only.

Queries are `[rows, heads, head_dim]`: decode has one row per request, a prompt's chunk one per
token.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from pipemax.proto.messages.control import StepPlan
from pipemax.proto.messages.types import pack_i32
from pipemax.stage_worker.attention import kernels
from pipemax.stage_worker.attention.paged import pool_array
from pipemax.stage_worker.attention.reference import gather
from pipemax.stage_worker.batch import StepBatch, prepare_batch

BLOCK_SIZE, HEAD_DIM = 16, 64
SCALING = HEAD_DIM**-0.5
"""Of whatever head size: results are compared with each other only."""
LAYER = 1

Item = tuple[int, int]
"""New tokens of a request, and tokens before them."""


def step_of(items: Sequence[Item]) -> tuple[StepBatch, list[torch.Tensor], int]:
    """A step of these, each request's block ids, and the pool's size. Blocks are scattered over the
    pool."""
    counts = [-(-(new + before) // BLOCK_SIZE) for new, before in items]
    ids = np.random.default_rng(0).permutation(sum(counts))
    plan = StepPlan(
        epoch=0,
        step=0,
        slot=0,
        wait_for_load=False,
        num_tokens=pack_i32([new for new, _ in items]),
        context_lens=pack_i32([before for _, before in items]),
        block_counts=pack_i32(counts),
        block_tables=pack_i32(ids.tolist()),
        token_ids=pack_i32([0] * sum(new for new, _ in items)),
        sample=(),
    )
    tables = [torch.from_numpy(part) for part in np.split(ids, np.cumsum(counts)[:-1])]
    return prepare_batch(plan, BLOCK_SIZE), tables, sum(counts)


def decode_batch(lens: Sequence[int]) -> tuple[StepBatch, list[torch.Tensor], int]:
    """`step_of` one token per request, which is the last of so many."""
    return step_of([(1, length - 1) for length in lens])


def padded(
    pool: torch.Tensor, tables: list[torch.Tensor], lens: torch.Tensor, query: torch.Tensor
) -> torch.Tensor:
    blocks = torch.nn.utils.rnn.pad_sequence(tables, batch_first=True)
    both = pool[blocks, LAYER].permute(2, 0, 4, 1, 3, 5).flatten(3, 4)
    mask = (torch.arange(both.shape[3])[None] < lens[:, None])[:, None, None]
    return scaled_dot_product_attention(
        query[:, :, None], both[0], both[1], attn_mask=mask, scale=SCALING, enable_gqa=True
    )[:, :, 0]


def per_request(
    pool: torch.Tensor, tables: list[torch.Tensor], lens: torch.Tensor, query: torch.Tensor
) -> torch.Tensor:
    out = torch.empty_like(query)
    for index, blocks in enumerate(tables):
        both = pool[blocks, LAYER].permute(1, 3, 0, 2, 4).flatten(2, 3)[:, :, : lens[index]]
        out[index] = scaled_dot_product_attention(
            query[index][None, :, None],
            both[0][None],
            both[1][None],
            scale=SCALING,
            enable_gqa=True,
        )[0, :, 0]
    return out


def in_place(
    pool: torch.Tensor, batch: StepBatch, query: torch.Tensor, layer: int = LAYER
) -> torch.Tensor:
    """The compiled kernel, which reads the blocks where they are."""
    out = torch.empty_like(query)
    kernels.attend(
        pool_array(pool),
        layer,
        pool_array(query),
        query.shape[1],
        batch.runs,
        scaling=SCALING,
        softcap=0.0,
        window=0,
        out=pool_array(out),
        threads=torch.get_num_threads(),
        pairs=True,
    )
    return out


def gathered(
    pool: torch.Tensor, tables: Sequence[torch.Tensor], items: Sequence[Item], query: torch.Tensor
) -> torch.Tensor:
    """Torch's attention, request after request, over a copy of each one's context."""
    out, first = torch.empty_like(query), 0
    for blocks, (new, before) in zip(tables, items, strict=True):
        keys, values = gather(pool, LAYER, blocks, before + new)
        mask = None
        if before:
            mask = torch.arange(before + new)[None] <= torch.arange(before, before + new)[:, None]
        out[first : first + new] = scaled_dot_product_attention(
            query[first : first + new].transpose(0, 1)[None],
            keys[None],
            values[None],
            attn_mask=mask,
            is_causal=mask is None,
            scale=SCALING,
            enable_gqa=keys.shape[0] != query.shape[1],
        )[0].transpose(0, 1)
        first += new
    return out
