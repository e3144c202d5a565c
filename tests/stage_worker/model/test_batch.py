"""A step plan becomes tensors; contradictions are caught before a kernel trusts them."""

import random

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipemax.proto.errors import WireError
from pipemax.proto.messages.control import SampleRow, StepPlan
from pipemax.proto.messages.types import pack_i32
from pipemax.stage_worker.batch import prepare_batch
from support.paged_run import Item, step_plan

_ITEMS = st.lists(
    st.tuples(st.integers(1, 60), st.integers(0, 90), st.booleans()), min_size=1, max_size=8
)


def _row(item: int) -> SampleRow:
    return SampleRow(item, 0, 0, 0.0, 0, 1.0, 0.0)


@given(shapes=_ITEMS, block_size=st.sampled_from([1, 8, 16]), seed=st.integers(0, 1000))
def test_every_token_has_its_place(
    shapes: list[tuple[int, int, bool]], block_size: int, seed: int
) -> None:
    rng = random.Random(seed)
    ids = rng.sample(range(5000), 2000)
    items = []
    for count, context, samples in shapes:
        blocks = [ids.pop() for _ in range(-(-(context + count) // block_size) + rng.randint(0, 2))]
        items.append(Item([rng.randrange(500) for _ in range(count)], context, blocks, samples))
    batch = prepare_batch(step_plan(items), block_size)

    tokens, positions, slots, ends = [], [], [], []
    for item in items:
        for index, token in enumerate(item.tokens):
            position = item.context_len + index
            tokens.append(token)
            positions.append(position)
            slots.append(item.blocks[position // block_size] * block_size + position % block_size)
        ends.append(len(tokens) - 1)
    assert batch.token_ids.tolist() == [tokens]
    assert batch.position_ids.tolist() == [positions]
    assert batch.slots.tolist() == slots
    assert batch.sample_rows.tolist() == [
        end for end, item in zip(ends, items, strict=True) if item.samples
    ]
    assert batch.num_tokens == len(tokens)
    assert batch.max_block == max(block for item in items for block in item.blocks)

    # Each row is in one run, behind the tokens before it.
    rows = []
    for first_row, count, context_len, table in zip(*batch.runs[:4], strict=True):
        assert count <= 32
        for row in range(first_row, first_row + count):
            rows.append(row)
            assert positions[row] == context_len + row - first_row
            block = batch.runs.blocks[table + positions[row] // block_size]
            assert block * block_size + positions[row] % block_size == slots[row]
    assert rows == list(range(len(tokens)))


_GOOD = step_plan([Item([1, 2, 3], 4, [0]), Item([4], 8, [1, 2])])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_tokens": b"\x01\x00\x00"}, "num_tokens is 3 bytes"),
        ({"num_tokens": pack_i32([3])}, "1 num_tokens, 2 context_lens and 2 block_counts"),
        ({"context_lens": pack_i32([4])}, "2 num_tokens, 1 context_lens"),
        ({"block_counts": pack_i32([1])}, "1 block_counts"),
        ({"num_tokens": pack_i32([4, 0])}, "an item without tokens"),
        ({"num_tokens": pack_i32([3, -1])}, "num_tokens holds -1"),
        ({"context_lens": pack_i32([-4, 8])}, "context_lens holds -4"),
        ({"block_tables": pack_i32([0, -1, 2])}, "block_tables holds -1"),
        ({"token_ids": pack_i32([1, 2, 3, -4])}, "token_ids holds -4"),
        ({"token_ids": pack_i32([1, 2, 3])}, "num_tokens sum to 4, 3 token_ids"),
        ({"num_tokens": pack_i32([2**31 - 1, 2**31 - 1])}, "num_tokens sum to 4294967294"),
        ({"block_tables": pack_i32([0, 1])}, "block_counts sum to 3, 2 block ids"),
        ({"context_lens": pack_i32([6, 8])}, "item 0 has 9 tokens and 1 blocks of 8"),
        ({"context_lens": pack_i32([2**31 - 1, 8])}, "item 0 has 2147483650 tokens"),
        ({"sample": (_row(2),)}, r"samples after items it does not have \(2 items\)"),
        ({"sample": (_row(-1),)}, "samples after items"),
    ],
)
def test_contradictions_are_refused(changes: dict[str, object], message: str) -> None:
    prepare_batch(_GOOD, 8)
    with pytest.raises(WireError, match=message) as caught:
        prepare_batch(msgspec.structs.replace(_GOOD, **changes), 8)
    assert caught.value.code == "bad_plan"


def test_a_plan_without_items_is_refused() -> None:
    empty = StepPlan(
        epoch=0,
        step=3,
        slot=0,
        wait_for_load=False,
        num_tokens=b"",
        context_lens=b"",
        block_counts=b"",
        block_tables=b"",
        token_ids=b"",
        sample=(),
    )
    with pytest.raises(WireError, match="step 3 has no items"):
        prepare_batch(empty, 8)


def test_tensors_are_of_the_types_the_model_takes() -> None:
    batch = prepare_batch(_GOOD, 8)
    assert batch.token_ids.dtype == batch.position_ids.dtype == torch.int64
    assert batch.sample_rows.dtype == torch.int64
    # Compiled kernels are compiled for one layout: writable, of these types.
    assert batch.runs.blocks.flags.writeable
    assert batch.slots.dtype == "int64"
    assert [column.dtype for column in batch.runs] == ["int64", *["int32"] * 4]
