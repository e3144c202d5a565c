"""The plain form of attention on a device: gather each item's context, softmax in float32.

Slow on purpose; any device, and any head size. Loops over items on the host, so it cannot be part
of a CUDA graph.
"""

import numpy as np
import torch

from pipemax.proto.errors import InvariantError
from pipemax.stage_worker.attention.device.batch import DeviceStep


class ReferenceBackend:
    """See AttentionBackend."""

    name = "reference"
    graphs = False

    def __init__(self) -> None:
        self._pool: torch.Tensor | None = None

    def bind_pool(self, pool: torch.Tensor) -> None:
        self._pool = pool

    def plan(self, step: DeviceStep) -> None:
        """Nothing to do."""

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
        pool, batch, columns = self._pool, step.batch, step.columns
        if pool is None:
            raise InvariantError("attention before a pool was bound")
        rows = columns.token_ids.shape[0]  # what comes after them is padding
        block_size = pool.shape[3]
        at = (batch.slots[:rows] // block_size, batch.slots[:rows] % block_size)
        pool[:, layer, 0].index_put_(at, key[:rows])
        pool[:, layer, 1].index_put_(at, value[:rows])
        out = torch.zeros_like(query, memory_format=torch.contiguous_format)
        for item in range(columns.num_tokens.shape[0]):
            table = int(columns.table_starts[item])
            length = int(columns.context_lens[item] + columns.num_tokens[item])
            blocks = batch.block_tables[table : table - (-length // block_size)]
            first, end = int(columns.row_starts[item]), int(columns.row_ends[item])
            out[first:end] = _attend_item(
                query[first:end],
                pool[:, layer].index_select(0, blocks).transpose(0, 1).flatten(1, 2)[:, :length],
                scaling=scaling,
                window=window,
                softcap=softcap,
            )
        return out


def _attend_item(
    query: torch.Tensor, keys_values: torch.Tensor, *, scaling: float, window: int, softcap: float
) -> torch.Tensor:
    """One item. query `[new tokens, heads, head_dim]`, `keys_values` `[2, tokens, kv_heads,
    head_dim]`, of which the last tokens are the new ones."""
    count, length = query.shape[0], keys_values.shape[1]
    group = query.shape[1] // keys_values.shape[2]
    keys, values = keys_values.float().repeat_interleave(group, dim=2).transpose(1, 2)
    scores = query.float().transpose(0, 1) @ keys.transpose(1, 2) * scaling
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    queries_at = torch.arange(length - count, length, device=query.device)[:, None]
    keys_at = torch.arange(length, device=query.device)[None]
    hidden = keys_at > queries_at
    if window:
        hidden |= keys_at <= queries_at - window
    weights = torch.softmax(scores.masked_fill(hidden, -np.inf), dim=-1)
    out: torch.Tensor = (weights @ values).transpose(0, 1).to(query.dtype)
    return out
