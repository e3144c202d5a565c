"""Attention in plain torch that reads a step's tensors alone, as the kernels for GPUs do.

So it may be part of a (simulated) graph and replayed for other steps, which the product's plain
form may not.
"""

import torch

from pipemax.proto.errors import InvariantError
from pipemax.stage_worker.attention.device.batch import DeviceBatch, DeviceStep
from pipemax.stage_worker.attention.device.layout import tile_tokens


class RecordableBackend:
    """See AttentionBackend. Nothing depends on a value, so that nobody waits for one: every item
    is given as many positions as the pool, or its table, could hold, most of them masked."""

    name = "reference"
    graphs = True

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
        if self._pool is None:
            raise InvariantError("attention before a pool was bound")
        pool, batch = self._pool[:, layer], step.batch
        _write(pool, batch.slots, torch.stack((key, value), dim=1))
        rows = query.shape[0]
        out = query.new_zeros((rows + 1, *query.shape[1:]))  # the last row is nobody's
        tile = tile_tokens(query.shape[1], key.shape[1], query.element_size())
        decodes = batch.decode_items.long()
        for items, starts, tokens in (
            (decodes, torch.zeros_like(decodes), 1),
            (batch.tile_items.long(), batch.tile_starts.long(), tile),
        ):
            if items.shape[0]:
                tiles = _Tiles(batch, items, starts, tokens)
                part = tiles.attend(pool, query, scaling, window, softcap)
                out[torch.where(tiles.valid, tiles.rows, rows)] = part.to(out.dtype)
        return out[:rows]


def _write(pool: torch.Tensor, slots: torch.Tensor, values: torch.Tensor) -> None:
    """`values` `[rows, 2, kv_heads, head_dim]`. Rows that go nowhere repeat what the first of the
    others writes."""
    goes = slots >= 0
    source = torch.where(goes, torch.arange(slots.shape[0]), goes.int().argmax())
    at = slots.index_select(0, source)
    size = pool.shape[2]
    pool[at // size, :, at % size] = values.index_select(0, source)


class _Tiles:
    """`tokens` new tokens of each of `items`, from `starts` on."""

    def __init__(
        self, batch: DeviceBatch, items: torch.Tensor, starts: torch.Tensor, tokens: int
    ) -> None:
        begins, ends = batch.query_starts.long()[items], batch.query_starts.long()[items + 1]
        within = starts[:, None] + torch.arange(tokens)
        self.rows = begins[:, None] + within
        """[tiles, tokens]"""
        self.lengths = batch.seq_lens.long()[items][:, None]
        self.positions = self.lengths - (ends - begins)[:, None] + within
        self.valid = (self.rows < ends[:, None]) & (self.lengths > 0)
        self._tables = batch.block_tables.long()
        self._first_blocks = batch.table_starts.long()[items][:, None]

    def attend(
        self, pool: torch.Tensor, query: torch.Tensor, scaling: float, window: int, softcap: float
    ) -> torch.Tensor:
        """`[tiles, tokens, heads, head_dim]`"""
        num_blocks, size = pool.shape[0], pool.shape[2]
        at = torch.arange(min(num_blocks, self._tables.shape[0]) * size)
        entries = (self._first_blocks + at // size).clamp(max=self._tables.shape[0] - 1)
        blocks = self._tables[entries].clamp(0, num_blocks - 1)
        there = (at < self.lengths)[..., None, None, None]
        context = torch.where(there, pool[blocks, :, at % size], 0.0).float()
        group = query.shape[1] // pool.shape[3]
        keys, values = context.repeat_interleave(group, dim=3, output_size=query.shape[1]).unbind(2)
        picked = query[self.rows.clamp(max=query.shape[0] - 1)].float()
        scores = torch.einsum("nthd,nlhd->nthl", picked, keys) * scaling
        if softcap:
            scores = torch.tanh(scores / softcap) * softcap
        seen = at <= self.positions[..., None]
        if window:
            seen &= at > self.positions[..., None] - window
        weights = torch.softmax(scores.masked_fill(~seen[:, :, None], float("-inf")), dim=-1)
        out = torch.einsum("nthl,nlhd->nthd", weights, values)
        return torch.where(self.valid[..., None, None], out, 0.0)
