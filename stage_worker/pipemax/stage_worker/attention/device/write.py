"""Writes a step's K and V into the pool, by our Triton kernel."""

from typing import Final

import torch

from pipemax.stage_worker.attention.device import triton_kernels as kernels
from pipemax.stage_worker.attention.device.launch import padded

_WIDTH: Final = 1024
"""Numbers of K, and of V, that one program copies."""


def write_kv(
    pool: torch.Tensor, layer: int, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> None:
    """`key` and `value` `[rows, kv_heads, head_dim]` to `slots` `[rows]` of one layer; a row whose
    slot is -1 goes nowhere."""
    key, value = dense_heads(key), dense_heads(value)
    _, _, _, block_size, kv_heads, head_dim = pool.shape
    width = min(_WIDTH, padded(kv_heads * head_dim))
    kernels.write_kv[(key.shape[0], -(-kv_heads * head_dim // width))](
        key,
        value,
        pool[:, layer, 0],
        pool[:, layer, 1],
        slots,
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        pool.stride(0),
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        WIDTH=width,
        num_warps=4,
    )


def dense_heads(tensor: torch.Tensor) -> torch.Tensor:
    """The kernels take any stride between rows and heads, none between numbers."""
    return tensor if tensor.stride(2) == 1 else tensor.contiguous()
