"""Attention whose decode steps may be recorded in a graph: it reads the batch's tensors alone."""

import torch

from pipemax.proto.geometry import BlockGeometry
from pipemax.stage_worker.attention.device.batch import DeviceStep
from pipemax.stage_worker.attention.device.paged import DevicePagedAttention
from pipemax.stage_worker.attention.device.reference import ReferenceBackend
from pipemax.stage_worker.dtypes import torch_dtype

LONGEST_TOKENS = 128


class CapturableBackend(ReferenceBackend):
    """Block 0 must be nobody's: rows of padding write to it what it holds."""

    name = "capturable"
    graphs = True

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
        batch = step.batch
        if batch.layout.tiles:
            return super().attend(
                step, layer, query, key, value, scaling=scaling, window=window, softcap=softcap
            )
        assert not window
        assert not softcap
        pool = self._pool
        assert pool is not None
        block_size = pool.shape[3]
        slots = batch.slots.clamp(min=0)
        at = (slots // block_size, slots % block_size)
        real = (batch.slots >= 0)[:, None, None]
        for index, new in enumerate((key, value)):
            held = pool[:, layer, index]
            held.index_put_(at, torch.where(real, new, held[at]))
        positions = torch.arange(LONGEST_TOKENS)
        tables = batch.table_starts[:, None] + positions[None] // block_size
        blocks = batch.block_tables[tables.clamp(max=batch.block_tables.shape[0] - 1).long()].long()
        seen = positions[None] < batch.seq_lens[:, None]
        blocks = torch.where(seen, blocks, 0)
        offsets = (positions % block_size)[None].expand_as(blocks)
        heads = torch.arange(query.shape[1]) // (query.shape[1] // key.shape[1])
        keys = pool[blocks, layer, 0, offsets].float()[:, :, heads]
        values = pool[blocks, layer, 1, offsets].float()[:, :, heads]
        scores = torch.einsum("rhd,rlhd->rhl", query.float(), keys) * scaling
        scores = scores.masked_fill(~seen[:, None], float("-inf"))
        weights = torch.softmax(scores, dim=-1)
        out = torch.einsum("rhl,rlhd->rhd", weights, values)
        return torch.where(real, out, 0.0).to(query.dtype)


def open_attention(
    geometry: BlockGeometry, num_heads: int, name: str, device: torch.device
) -> DevicePagedAttention:
    """In the place of `select.open_attention`."""
    return DevicePagedAttention(
        geometry, torch_dtype(geometry.dtype), num_heads, CapturableBackend()
    )
