"""A step plan becomes one packed buffer, and views on it."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipemax.proto.errors import InvariantError
from pipemax.stage_worker.attention.device.batch import view_batch
from pipemax.stage_worker.attention.device.layout import (
    BatchLayout,
    Field,
    pack_step,
    tile_tokens,
)
from pipemax.stage_worker.plan_columns import PlanColumns, read_columns
from support.paged_run import Item, step_plan

_ITEMS = st.lists(
    st.tuples(st.integers(1, 60) | st.just(1), st.integers(0, 90), st.booleans()),
    min_size=1,
    max_size=8,
)
_FIELDS = (
    "token_ids",
    "position_ids",
    "slots",
    "sample_rows",
    "seq_lens",
    "query_starts",
    "table_starts",
    "decode_items",
    "tile_items",
    "tile_starts",
    "block_tables",
)


def _items(shapes: list[tuple[int, int, bool]], block_size: int, seed: int = 0) -> list[Item]:
    rng = random.Random(seed)
    ids = rng.sample(range(5000), 2000)
    items = []
    for count, context, samples in shapes:
        blocks = [ids.pop() for _ in range(-(-(context + count) // block_size) + rng.randint(0, 2))]
        items.append(Item([rng.randrange(500) for _ in range(count)], context, blocks, samples))
    return items


def _columns(items: list[Item], block_size: int) -> PlanColumns:
    return read_columns(step_plan(items), block_size)


@given(
    shapes=_ITEMS,
    block_size=st.sampled_from([1, 8, 16]),
    tile=st.sampled_from([1, 5, 16, 64]),
    seed=st.integers(0, 1000),
)
def test_every_number_has_its_place(
    shapes: list[tuple[int, int, bool]], block_size: int, tile: int, seed: int
) -> None:
    items = _items(shapes, block_size, seed)
    columns = _columns(items, block_size)
    layout = BatchLayout.of_step(columns, tile)
    buffer = np.full(layout.num_bytes, 0xEE, np.uint8)
    assert pack_step(columns, layout, tile, buffer) == layout.num_bytes
    batch = view_batch(torch.from_numpy(buffer), layout)

    row = 0
    tiles = []
    for index, item in enumerate(items):
        assert int(batch.query_starts[index]) == row
        assert int(batch.seq_lens[index]) == item.context_len + len(item.tokens)
        table = int(batch.table_starts[index])
        assert batch.block_tables[table : table + len(item.blocks)].tolist() == item.blocks
        for offset, token in enumerate(item.tokens):
            position = item.context_len + offset
            slot = item.blocks[position // block_size] * block_size + position % block_size
            assert int(batch.token_ids[0, row]) == token
            assert int(batch.position_ids[0, row]) == position
            assert int(batch.slots[row]) == slot
            row += 1
        if len(item.tokens) > 1:
            tiles += [(index, first) for first in range(0, len(item.tokens), tile)]
    assert int(batch.query_starts[-1]) == row == layout.rows
    assert batch.decode_items.tolist() == [
        index for index, item in enumerate(items) if len(item.tokens) == 1
    ]
    assert list(zip(batch.tile_items.tolist(), batch.tile_starts.tolist(), strict=True)) == tiles
    assert batch.sample_rows.tolist() == [
        int(batch.query_starts[index + 1]) - 1 for index, item in enumerate(items) if item.samples
    ]


@given(
    contexts=st.lists(st.integers(0, 90), min_size=1, max_size=8),
    padding=st.integers(0, 9),
    spare_blocks=st.integers(0, 40),
)
def test_padding_reads_and_writes_nothing(
    contexts: list[int], padding: int, spare_blocks: int
) -> None:
    items = _items([(1, context, True) for context in contexts], 8)
    columns = _columns(items, 8)
    rows = len(items) + padding
    layout = BatchLayout.of_decodes(rows, columns.block_tables.shape[0] + spare_blocks)
    buffer = np.full(layout.num_bytes, 0x7F, np.uint8)
    used = pack_step(columns, layout, 16, buffer)
    assert used == layout.num_bytes - 4 * spare_blocks
    batch = view_batch(torch.from_numpy(buffer), layout)
    real = len(items)
    assert batch.slots[:real].tolist() == columns.slots.tolist()
    assert batch.slots[real:].tolist() == [-1] * padding
    assert batch.seq_lens[real:].tolist() == [0] * padding
    assert batch.query_starts.tolist() == list(range(rows + 1))
    assert batch.decode_items.tolist() == list(range(rows))
    for column in (batch.token_ids[0], batch.position_ids[0], batch.sample_rows):
        assert column[real:].tolist() == [0] * padding


def test_columns_are_aligned_and_do_not_overlap() -> None:
    columns = _columns(_items([(1, 4, True), (40, 0, True), (1, 1, False)], 8), 8)
    for layout in (BatchLayout.of_step(columns, 16), BatchLayout.of_decodes(5, 100)):
        end = 0
        for name in _FIELDS:
            field: Field = getattr(layout, name)
            assert field.offset >= end
            assert field.offset % 64 == 0
            end = field.offset + field.num_bytes
        assert layout.num_bytes == end


def test_tables_come_last_so_that_addresses_do_not_depend_on_their_room() -> None:
    small, large = BatchLayout.of_decodes(5, 10), BatchLayout.of_decodes(5, 10_000)
    assert [getattr(small, name).offset for name in _FIELDS] == [
        getattr(large, name).offset for name in _FIELDS
    ]


@pytest.mark.parametrize(
    ("shapes", "layout"),
    [
        ([(1, 0, True)] * 3, BatchLayout.of_decodes(2, 100)),  # rows
        ([(1, 90, True)], BatchLayout.of_decodes(2, 3)),  # blocks
        ([(2, 0, True)], BatchLayout.of_decodes(2, 100)),  # not a decode
        ([(1, 0, True)] * 2, BatchLayout(2, 2, 2, 0, 1, 100)),  # samples
    ],
)
def test_a_step_that_does_not_fit_is_refused(
    shapes: list[tuple[int, int, bool]], layout: BatchLayout
) -> None:
    columns = _columns(_items(shapes, 8), 8)
    with pytest.raises(InvariantError, match="for a buffer of"):
        pack_step(columns, layout, 16, np.empty(10_000, np.uint8))


def test_a_buffer_too_small_or_of_other_numbers_is_refused() -> None:
    layout = BatchLayout.of_decodes(2, 4)
    with pytest.raises(InvariantError, match="a buffer of"):
        view_batch(torch.empty(layout.num_bytes - 1, dtype=torch.uint8), layout)
    with pytest.raises(InvariantError, match="a buffer of"):
        view_batch(torch.empty(layout.num_bytes, dtype=torch.int8), layout)


def test_batches_are_told_apart_by_identity() -> None:
    """Backends keep what belongs to one batch's addresses."""
    layout = BatchLayout.of_decodes(2, 4)
    buffer = torch.empty(layout.num_bytes, dtype=torch.uint8)
    assert len({view_batch(buffer, layout), view_batch(buffer, layout)}) == 2


@pytest.mark.parametrize(("heads", "tokens"), [((8, 8), 64), ((32, 8), 16), ((28, 4), 9)])
def test_tiles_hold_the_heads_of_one_kv_head(heads: tuple[int, int], tokens: int) -> None:
    assert tile_tokens(*heads, itemsize=2) == tokens
    assert tile_tokens(*heads, itemsize=4) <= tokens // 4
    assert tile_tokens(128, 1, itemsize=2) == 1
