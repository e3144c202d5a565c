"""What every way to attend on a device offers."""

from typing import Protocol

import torch

from pipemax.stage_worker.attention.device.batch import DeviceStep


class AttentionBackend(Protocol):
    """Attention over the paged pool of one stage, for steps on a device.

    The pool is `[num_blocks, layers, 2, block_size, kv_heads, head_dim]`, contiguous, and is read
    in place. Nothing here waits for the device.
    """

    name: str
    graphs: bool
    """Whether `attend` may be recorded in a CUDA graph and replayed for other steps of the same
    DeviceBatch."""

    def bind_pool(self, pool: torch.Tensor) -> None:
        """The pool of all later calls."""

    def plan(self, step: DeviceStep) -> None:
        """Once per step, before its first `attend` or the replay of its graph, never inside a
        graph."""

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
        """Writes the step's K and V `[rows, kv_heads, head_dim]` into `layer` of the pool, then
        attends: `[rows, heads, head_dim]` for `query` of the same shape. A row of padding writes
        nothing and gets zeros. `window` 0 is no window, `softcap` 0 no soft-cap."""
