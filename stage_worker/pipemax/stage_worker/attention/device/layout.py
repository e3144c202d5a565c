"""Where a step's inputs lie in the one buffer that is copied to the device. Imports no torch.

The host packs a step into a pinned buffer and copies a prefix of it to device memory with the same
layout; kernels read it there. The flat block tables come last, because they alone vary much from
step to step: a buffer has room for the longest, and only what a step uses is copied.

A layout may have more rows than the step. Every row too many belongs to an item of its own that
nobody asked for: no context, sequence length 0, slot -1. Nothing is written for it and its output
is zeros, so that a CUDA graph recorded for so many rows replays any decode step that has no more.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from pipemax.proto.errors import InvariantError
from pipemax.stage_worker.plan_columns import I64Array, PlanColumns

U8Array: TypeAlias = npt.NDArray[np.uint8]

_ALIGNMENT_BYTES: Final = 64
_TILE_ROWS: Final = {2: 64, 4: 16}
"""Query rows (tokens times the heads that share a KV head) of one program of a prefill kernel, by
bytes of a number: without tensor cores, more rows do not fit a float32 program's registers."""
PADDING_SLOT: Final = -1
"""The slot of a row whose K and V go nowhere."""


def tile_tokens(num_heads: int, num_kv_heads: int, itemsize: int) -> int:
    """New tokens of one item that a prefill kernel takes at a time. `itemsize`: bytes of a number
    in the pool."""
    return max(1, _TILE_ROWS[itemsize] // (num_heads // num_kv_heads))


@dataclass(frozen=True, slots=True)
class Field:
    """One column of the buffer."""

    offset: int
    """Bytes from the buffer's begin; a multiple of 64."""
    length: int
    """Numbers."""
    dtype: type[np.int32] | type[np.int64]

    @property
    def num_bytes(self) -> int:
        return self.length * np.dtype(self.dtype).itemsize

    def of(self, buffer: U8Array) -> npt.NDArray[Any]:
        """This column of a buffer: a view."""
        return buffer[self.offset : self.offset + self.num_bytes].view(self.dtype)


@dataclass(frozen=True)
class BatchLayout:
    """Sizes of a step's columns. Equal layouts place everything at equal offsets, which are worked
    out once for each: on the way to a step, every microsecond counts."""

    rows: int
    """Tokens, padding included."""
    items: int
    """Requests, and one for each row of padding."""
    decodes: int
    """Items with one token, padding included: they come with a list of their own."""
    tiles: int
    """Pieces of at most `tile_tokens` new tokens of the other items."""
    samples: int
    """Rows that logits are made of."""
    table_blocks: int
    """Room for device block ids, of all items together."""
    fixed: bool = False
    """Whether the buffer is filled again and again, and read by a CUDA graph."""

    @classmethod
    def of_step(cls, columns: PlanColumns, tile_tokens: int) -> "BatchLayout":
        """Exactly the room that a step needs."""
        many = columns.num_tokens[columns.num_tokens > 1]
        return cls(
            rows=columns.token_ids.shape[0],
            items=columns.num_tokens.shape[0],
            decodes=columns.num_tokens.shape[0] - many.shape[0],
            tiles=int((-(-many // tile_tokens)).sum()),
            samples=columns.sampled.shape[0],
            table_blocks=columns.block_tables.shape[0],
        )

    @classmethod
    def of_decodes(cls, rows: int, table_blocks: int) -> "BatchLayout":
        """Room for every step of at most `rows` items, each of one token, that has no more than
        `table_blocks` device blocks: the layout of a CUDA graph. Logits are made of every row."""
        return cls(rows, rows, rows, 0, rows, table_blocks, fixed=True)

    @cached_property
    def token_ids(self) -> Field:
        return Field(0, self.rows, np.int64)

    @cached_property
    def position_ids(self) -> Field:
        return _after(self.token_ids, self.rows, np.int64)

    @cached_property
    def slots(self) -> Field:
        return _after(self.position_ids, self.rows, np.int64)

    @cached_property
    def sample_rows(self) -> Field:
        return _after(self.slots, self.samples, np.int64)

    @cached_property
    def seq_lens(self) -> Field:
        return _after(self.sample_rows, self.items, np.int32)

    @cached_property
    def query_starts(self) -> Field:
        return _after(self.seq_lens, self.items + 1, np.int32)

    @cached_property
    def table_starts(self) -> Field:
        return _after(self.query_starts, self.items, np.int32)

    @cached_property
    def decode_items(self) -> Field:
        return _after(self.table_starts, self.decodes, np.int32)

    @cached_property
    def tile_items(self) -> Field:
        return _after(self.decode_items, self.tiles, np.int32)

    @cached_property
    def tile_starts(self) -> Field:
        return _after(self.tile_items, self.tiles, np.int32)

    @cached_property
    def block_tables(self) -> Field:
        return _after(self.tile_starts, self.table_blocks, np.int32)

    @cached_property
    def num_bytes(self) -> int:
        """Of a buffer with this layout."""
        return self.block_tables.offset + self.block_tables.num_bytes


def pack_step(columns: PlanColumns, layout: BatchLayout, tile_tokens: int, buffer: U8Array) -> int:
    """Writes a step into `buffer`, uint8 of at least `layout.num_bytes`, and returns how many of
    its first bytes have to be copied to the device. Raises InvariantError when the step does not
    fit.

    Bytes between the columns are left as they are.
    """
    own = BatchLayout.of_step(columns, tile_tokens)
    padding = layout.rows - own.rows
    if padding < 0 or own.table_blocks > layout.table_blocks or own.samples > layout.samples:
        raise InvariantError(f"a step of {own} for a buffer of {layout}")
    if (layout.items, layout.decodes, layout.tiles) != (
        own.items + padding,
        own.decodes + padding,
        own.tiles,
    ):
        raise InvariantError(f"a step of {own} for a buffer of {layout}")
    context_and_new = columns.context_lens + columns.num_tokens
    _fill(layout.token_ids, buffer, columns.token_ids, 0)
    _fill(layout.position_ids, buffer, columns.positions, 0)
    _fill(layout.slots, buffer, columns.slots, PADDING_SLOT)
    _fill(layout.sample_rows, buffer, columns.sample_rows, 0)
    _fill(layout.seq_lens, buffer, context_and_new, 0)
    starts = layout.query_starts.of(buffer)
    starts[0] = 0
    starts[1 : own.items + 1] = columns.row_ends
    starts[own.items + 1 :] = np.arange(own.rows + 1, layout.rows + 1)
    _fill(layout.table_starts, buffer, columns.table_starts, 0)
    decode_items = layout.decode_items.of(buffer)
    decode_items[: own.decodes] = np.flatnonzero(columns.num_tokens == 1)
    decode_items[own.decodes :] = np.arange(own.items, layout.items)
    layout.tile_items.of(buffer)[:], layout.tile_starts.of(buffer)[:] = _tiles(columns, tile_tokens)
    layout.block_tables.of(buffer)[: own.table_blocks] = columns.block_tables
    return layout.block_tables.offset + 4 * own.table_blocks


def _tiles(columns: PlanColumns, tile_tokens: int) -> tuple[I64Array, I64Array]:
    """Items of more than one token cut into tiles: each tile's item, and how many of the item's new
    tokens come before it."""
    items = np.flatnonzero(columns.num_tokens > 1)
    counts = -(-columns.num_tokens[items].astype(np.int64) // tile_tokens)
    first_tiles = np.cumsum(counts) - counts
    within = np.arange(counts.sum()) - np.repeat(first_tiles, counts)
    return np.repeat(items, counts), within * tile_tokens


def _fill(field: Field, buffer: U8Array, values: npt.NDArray[Any], rest: int) -> None:
    """Writes a column; what `values` leave of it becomes `rest`."""
    column = field.of(buffer)
    column[: values.shape[0]] = values
    column[values.shape[0] :] = rest


def _after(field: Field, length: int, dtype: type[np.int32] | type[np.int64]) -> Field:
    end = field.offset + field.num_bytes
    return Field(-(-end // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES, length, dtype)
