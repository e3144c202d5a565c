"""Attention by our own Triton kernels: any GPU that Triton knows, any head size."""

import math
from typing import Any, Final

import torch

from pipemax.proto.errors import InvariantError
from pipemax.stage_worker.attention.device import triton_kernels as kernels
from pipemax.stage_worker.attention.device.batch import DeviceStep
from pipemax.stage_worker.attention.device.launch import (
    MAX_SPLITS,
    Launch,
    decode_launch,
    num_splits,
    padded,
    prefill_launch,
)
from pipemax.stage_worker.attention.device.layout import tile_tokens
from pipemax.stage_worker.attention.device.write import dense_heads, write_kv

_LOG2_E: Final = math.log2(math.e)
_NO_WINDOW: Final = 2**31 - 1


class TritonBackend:
    """See AttentionBackend."""

    name = "triton"
    graphs = True

    def __init__(
        self,
        multiprocessors: int,
        *,
        decode: Launch | None = None,
        prefill: Launch | None = None,
        splits: int | None = None,
    ) -> None:
        """`multiprocessors` of the GPU. The others are for measuring: instead of `launch`'s."""
        self._multiprocessors = multiprocessors
        self._decode = decode
        self._prefill = prefill
        self._splits = splits
        self._pool: torch.Tensor | None = None

    def bind_pool(self, pool: torch.Tensor) -> None:
        self._pool = pool
        head_dim, itemsize = pool.shape[5], pool.element_size()
        self._decode = self._decode or decode_launch(head_dim, itemsize)
        self._prefill = self._prefill or prefill_launch(head_dim, itemsize)

    def plan(self, step: DeviceStep) -> None:
        """Nothing to do: kernels find what they need in the batch."""

    def attend(
        self,
        step: DeviceStep,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scaling: float,
        window: int,
        softcap: float,
    ) -> torch.Tensor:
        if self._pool is None:
            raise InvariantError("attention before a pool was bound")
        call = _Call(self._pool, layer, step, query, scaling, window, softcap)
        write_kv(self._pool, layer, step.batch.slots, key, value)
        out = torch.empty_like(call.query, memory_format=torch.contiguous_format)
        assert self._decode is not None
        assert self._prefill is not None
        if step.batch.layout.decodes:
            splits = self._splits or num_splits(
                step.batch.layout.decodes, call.kv_heads, self._multiprocessors
            )
            _attend_decodes(call, out, self._decode, splits)
        if step.batch.layout.tiles:
            _attend_tiles(call, out, self._prefill)
        return out


class _Call:
    """What the kernels of one layer's attention have in common."""

    def __init__(
        self,
        pool: torch.Tensor,
        layer: int,
        step: DeviceStep,
        query: torch.Tensor,
        scaling: float,
        window: int,
        softcap: float,
    ) -> None:
        self.batch = step.batch
        self.keys, self.values = pool[:, layer, 0], pool[:, layer, 1]
        self.block_stride = pool.stride(0)
        self.block_size, self.kv_heads, self.head_dim = pool.shape[3:]
        self.query = dense_heads(query)
        self.group = query.shape[1] // self.kv_heads
        self.window = window or _NO_WINDOW
        self.softcap = softcap > 0.0
        self.inner = scaling / softcap if softcap else 0.0
        self.outer = (softcap or scaling) * _LOG2_E
        self.precision = "ieee" if pool.dtype == torch.float32 else "tf32"

    @property
    def shape(self) -> dict[str, Any]:
        """Compile-time sizes of the kernels that attend."""
        return {
            "KV_HEADS": self.kv_heads,
            "GROUP": self.group,
            "HEAD_DIM": self.head_dim,
            "BLOCK_SIZE": self.block_size,
            "DIMS": padded(self.head_dim),
            "SOFTCAP": self.softcap,
            "PRECISION": self.precision,
        }


def _attend_decodes(call: _Call, out: torch.Tensor, launch: Launch, splits: int) -> None:
    batch, heads = call.batch, out.shape[1]
    decodes = batch.layout.decodes
    if splits > 1:
        shape = (decodes, heads, splits)
        sums = torch.empty((*shape, call.head_dim), dtype=torch.float32, device=out.device)
        stats = torch.empty((*shape, 2), dtype=torch.float32, device=out.device)
    else:
        sums = stats = out  # not used
    kernels.attend_decodes[(call.kv_heads, splits, decodes)](
        out,
        sums,
        stats,
        call.query,
        call.keys,
        call.values,
        batch.decode_items,
        batch.query_starts,
        batch.seq_lens,
        batch.table_starts,
        batch.block_tables,
        call.inner,
        call.outer,
        call.window,
        splits,
        call.query.stride(0),
        call.query.stride(1),
        call.block_stride,
        ROWS=padded(call.group),
        TILE=launch.tile,
        WHOLE=splits == 1,
        **call.shape,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    if splits > 1:
        kernels.reduce_splits[(heads, decodes)](
            out,
            sums,
            stats,
            batch.decode_items,
            batch.query_starts,
            batch.seq_lens,
            call.window,
            splits,
            HEADS=heads,
            HEAD_DIM=call.head_dim,
            DIMS=padded(call.head_dim),
            TILE=launch.tile,
            MAX_SPLITS=MAX_SPLITS,
            num_warps=1,
        )


def _attend_tiles(call: _Call, out: torch.Tensor, launch: Launch) -> None:
    batch = call.batch
    tokens = tile_tokens(out.shape[1], call.kv_heads, out.element_size())
    kernels.attend_tiles[(call.kv_heads, batch.layout.tiles)](
        out,
        call.query,
        call.keys,
        call.values,
        batch.tile_items,
        batch.tile_starts,
        batch.query_starts,
        batch.seq_lens,
        batch.table_starts,
        batch.block_tables,
        call.inner,
        call.outer,
        call.window,
        call.query.stride(0),
        call.query.stride(1),
        call.block_stride,
        TOKENS=tokens,
        ROWS=padded(tokens * call.group),
        TILE=launch.tile,
        **call.shape,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
