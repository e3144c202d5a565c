"""A step's inputs on the device: views on the buffer that `layout.pack_step` filled on the host."""

from dataclasses import dataclass

import numpy as np
import torch

from pipemax.proto.errors import InvariantError
from pipemax.stage_worker.attention.device.layout import BatchLayout, Field
from pipemax.stage_worker.plan_columns import PlanColumns


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class DeviceBatch:
    """Views whose addresses stay the same however often the buffer is filled anew; so a CUDA graph
    may be recorded over them. Two batches are equal only if they are the same object."""

    layout: BatchLayout
    token_ids: torch.Tensor
    """int64 [1, rows]"""
    position_ids: torch.Tensor
    """int64 [1, rows]"""
    slots: torch.Tensor
    """int64 [rows] where each token's K and V go: block id · block_size + offset in the block; -1
    is nowhere."""
    sample_rows: torch.Tensor
    """int64 [samples]: the row of each sampled item's last token; row 0 where there is none."""
    seq_lens: torch.Tensor
    """int32 [items]: context and new tokens; 0 for padding."""
    query_starts: torch.Tensor
    """int32 [items + 1]: each item's first row, and the number of rows."""
    table_starts: torch.Tensor
    """int32 [items]: where each item begins in `block_tables`."""
    decode_items: torch.Tensor
    """int32 [decodes]: the items of one token."""
    tile_items: torch.Tensor
    """int32 [tiles]: the item of each tile of new tokens."""
    tile_starts: torch.Tensor
    """int32 [tiles]: how many of the item's new tokens come before the tile."""
    block_tables: torch.Tensor
    """int32 [table_blocks]: device block ids, item after item."""


@dataclass(frozen=True, slots=True)
class DeviceStep:
    """A step, on the device and on the host. A CUDA graph reads `batch` alone."""

    batch: DeviceBatch
    columns: PlanColumns
    """What was packed into `batch`."""

    @property
    def token_ids(self) -> torch.Tensor:
        return self.batch.token_ids

    @property
    def position_ids(self) -> torch.Tensor:
        return self.batch.position_ids

    @property
    def sample_rows(self) -> torch.Tensor:
        return self.batch.sample_rows

    @property
    def num_tokens(self) -> int:
        """Rows, padding included."""
        return self.batch.layout.rows

    @property
    def max_token(self) -> int:
        return self.columns.max_token


def view_batch(buffer: torch.Tensor, layout: BatchLayout) -> DeviceBatch:
    """The views on `buffer`, uint8 `[at least layout.num_bytes]` on any device, whose address must
    be a multiple of 64."""
    if buffer.dtype != torch.uint8 or buffer.dim() != 1 or buffer.shape[0] < layout.num_bytes:
        raise InvariantError(
            f"a buffer of {buffer.dtype} {tuple(buffer.shape)} for {layout.num_bytes} bytes"
        )

    def view(field: Field) -> torch.Tensor:
        column = buffer[field.offset : field.offset + field.num_bytes]
        return column.view(torch.int64 if field.dtype is np.int64 else torch.int32)

    return DeviceBatch(
        layout,
        token_ids=view(layout.token_ids)[None],
        position_ids=view(layout.position_ids)[None],
        slots=view(layout.slots),
        sample_rows=view(layout.sample_rows),
        seq_lens=view(layout.seq_lens),
        query_starts=view(layout.query_starts),
        table_starts=view(layout.table_starts),
        decode_items=view(layout.decode_items),
        tile_items=view(layout.tile_items),
        tile_starts=view(layout.tile_starts),
        block_tables=view(layout.block_tables),
    )
