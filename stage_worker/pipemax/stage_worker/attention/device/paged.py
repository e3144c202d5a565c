"""Paged attention of one stage whose steps' inputs lie on a device."""

import numpy as np
import torch

from pipemax.proto.errors import InvariantError
from pipemax.proto.geometry import BlockGeometry
from pipemax.proto.messages.control import StepPlan
from pipemax.stage_worker.attention.device.base import AttentionBackend
from pipemax.stage_worker.attention.device.batch import DeviceStep, view_batch
from pipemax.stage_worker.attention.device.layout import BatchLayout, pack_step, tile_tokens
from pipemax.stage_worker.plan_columns import read_columns


class DevicePagedAttention:
    """The KV pool of one stage and the step that runs over it; see `paged.PagedAttention`, its
    sibling for steps in host memory."""

    def __init__(
        self,
        geometry: BlockGeometry,
        dtype: torch.dtype,
        num_heads: int,
        backend: AttentionBackend,
    ) -> None:
        self.geometry = geometry
        self.dtype = dtype
        self.backend = backend
        self.tile_tokens = tile_tokens(num_heads, geometry.num_kv_heads, dtype.itemsize)
        """For packing steps: see `layout`."""
        self._pool: torch.Tensor | None = None
        self._step: DeviceStep | None = None

    def bind_pool(self, pool: torch.Tensor) -> None:
        """Takes a contiguous `[num_blocks, layers, 2, block_size, kv_heads, head_dim]` pool."""
        if pool.dim() != 6 or tuple(pool.shape[1:]) != self.geometry.block_shape:
            raise InvariantError(
                f"pool of shape {tuple(pool.shape)} for blocks of {self.geometry.block_shape}"
            )
        if pool.dtype != self.dtype or not pool.is_contiguous():
            raise InvariantError(f"pool of {pool.dtype}, contiguous {pool.is_contiguous()}")
        self._pool = pool
        self.backend.bind_pool(pool)

    def prepare(self, plan: StepPlan) -> DeviceStep:
        """The step in a buffer of its own, for starting up and for tests; waits for the copy. A
        stage at work packs its steps into buffers that it keeps."""
        if self._pool is None:
            raise InvariantError("a step before the pool was bound")
        columns = read_columns(plan, self.geometry.block_size)
        layout = BatchLayout.of_step(columns, self.tile_tokens)
        buffer = np.empty(layout.num_bytes, np.uint8)
        pack_step(columns, layout, self.tile_tokens, buffer)
        step = DeviceStep(
            view_batch(torch.from_numpy(buffer).to(self._pool.device), layout), columns
        )
        self.plan(step)
        return step

    def warm_up(self) -> None:
        """Kernels are compiled by the first step that needs them."""

    def plan(self, step: DeviceStep) -> None:
        """Once per step, before it runs or its graph is replayed, never inside a graph."""
        if self._pool is None:
            raise InvariantError("a step before the pool was bound")
        if step.columns.max_block >= self._pool.shape[0]:
            raise InvariantError(
                f"block {step.columns.max_block} of a pool of {self._pool.shape[0]} blocks"
            )
        self.backend.plan(step)

    def begin(self, step: DeviceStep) -> None:
        """Makes `step` the one that the layers' next calls belong to."""
        self._step = step

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        window: int,
        softcap: float,
    ) -> torch.Tensor:
        """Writes the step's K and V, then attends. query `[rows, heads, head_dim]`, key and value
        `[rows, kv_heads, head_dim]`; the same shape as `query` comes back."""
        step = self._step
        if step is None:
            raise InvariantError("attention outside a step")
        # The kernels check no bounds.
        expected = (step.num_tokens, self.geometry.num_kv_heads, self.geometry.head_dim)
        if key.shape != expected or value.shape != expected:
            raise InvariantError(
                f"K of shape {tuple(key.shape)} and V of {tuple(value.shape)}, not {expected}"
            )
        return self.backend.attend(
            step, layer, query, key, value, scaling=scaling, window=window, softcap=softcap
        )
