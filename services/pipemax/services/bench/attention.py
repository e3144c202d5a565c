"""Ways to attend over the paged pool on a CPU. Imports torch: for programs of their own only.

Decode has one query per request, `[batch, heads, HEAD_DIM]`; a prompt's chunk has one per token.
"""

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from pipemax.proto.messages.control import StepPlan
from pipemax.proto.messages.types import pack_i32
from pipemax.stage_worker.attention import kernels
from pipemax.stage_worker.attention.paged import pool_array
from pipemax.stage_worker.attention.prefill import prefill
from pipemax.stage_worker.batch import PrefillItem, StepBatch, prepare_batch

BLOCK_SIZE, HEAD_DIM = 16, 64
SCALING = HEAD_DIM**-0.5
LAYER = 1


def decode_batch(lens: list[int]) -> tuple[StepBatch, list[torch.Tensor], int]:
    """A step of one token per request, each request's block ids, and the pool's size. Blocks are
    scattered over the pool."""
    counts = [-(-length // BLOCK_SIZE) for length in lens]
    ids = np.random.default_rng(0).permutation(sum(counts))
    plan = StepPlan(
        epoch=0,
        step=0,
        slot=0,
        wait_for_load=False,
        num_tokens=pack_i32([1] * len(lens)),
        context_lens=pack_i32([length - 1 for length in lens]),
        block_counts=pack_i32(counts),
        block_tables=pack_i32(ids.tolist()),
        token_ids=pack_i32([0] * len(lens)),
        sample=(),
    )
    tables = [torch.from_numpy(part) for part in np.split(ids, np.cumsum(counts)[:-1])]
    return prepare_batch(plan, BLOCK_SIZE), tables, sum(counts)


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
    out = torch.empty(query.shape, dtype=torch.float32)
    kernels.attend(
        pool_array(pool),
        layer,
        query.float().numpy(),
        batch.paged_tables,
        batch.paged_lens,
        batch.block_tables,
        scaling=SCALING,
        softcap=0.0,
        window=0,
        out=out.numpy(),
        threads=torch.get_num_threads(),
    )
    return out.to(query.dtype)


def gathered(
    pool: torch.Tensor, item: PrefillItem, query: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    settings = {"scaling": SCALING, "softcap": 0.0, "window": 0, "block_size": BLOCK_SIZE}
    return prefill(pool, LAYER, item, query, mask, **settings)


def every_token(pool: torch.Tensor, item: PrefillItem, query: torch.Tensor) -> torch.Tensor:
    """The in-place kernel, with each new token a row of its own."""
    lens = np.arange(item.num_tokens, dtype=np.int32) + np.int32(item.context_len + 1)
    out = torch.empty(query.shape, dtype=torch.float32)
    kernels.attend(
        pool_array(pool),
        LAYER,
        query.float().numpy(),
        np.zeros_like(lens),
        lens,
        item.blocks.numpy().astype(np.int32),
        scaling=SCALING,
        softcap=0.0,
        window=0,
        out=out.numpy(),
        threads=torch.get_num_threads(),
    )
    return out.to(query.dtype)
