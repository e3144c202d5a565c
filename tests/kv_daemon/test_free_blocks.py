"""The free list: no block twice, neighbours for those who grow."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from pipemax.kv_daemon.free_blocks import FreeBlocks
from pipemax.kv_daemon.host_blocks import HostTable


@given(
    total=st.integers(1, 40),
    choices=st.lists(st.tuples(st.sampled_from(["new", "at", "back"]), st.integers(0, 39))),
)
def test_agrees_with_a_set_of_free_blocks(total: int, choices: list[tuple[str, int]]) -> None:
    blocks = FreeBlocks(total)
    free = set(range(total))
    for choice, number in choices:
        if choice == "new" and free:
            block = blocks.take_new_run(number)
            assert block in free
            free.remove(block)
        elif choice == "at":
            first_of_extent = number in free and number - 1 not in free
            assert blocks.take_at(number) == first_of_extent
            if first_of_extent:
                free.remove(number)
        elif choice == "back" and number < total and number not in free:
            blocks.give_back(number)
            free.add(number)
        blocks.check_invariants()
        assert blocks.num_free == len(free)
        assert {b for start, end in blocks.extents() for b in range(start, end)} == free


def test_stale_entries_of_the_heap_do_not_pile_up() -> None:
    blocks = FreeBlocks(1000)
    for _ in range(5):
        for block in range(1000):
            assert blocks.take_at(block)
        for block in reversed(range(1000)):
            blocks.give_back(block)
    assert len(blocks._largest) < 200


def test_requests_that_grow_in_turn_stay_contiguous() -> None:
    """Sixteen requests grow by one block each in turn until half the pool is taken. First fit
    would interleave them and merge nothing."""
    table = HostTable(1024)
    for index in range(32):
        for request in range(16):
            table.place(table.add(request, index, 1), 1)
    breaks = 0
    for request in range(16):
        ids = [table.find(request, index) for index in range(32)]
        for before, after in pairwise(ids):
            assert before is not None
            assert after is not None
            breaks += after.host_id != before.host_id + 1
    assert breaks == 0


def test_a_prompt_is_placed_as_one_run_where_there_is_room() -> None:
    table = HostTable(100)
    for request in range(4):
        for index in range(20):
            table.place(table.add(request, index, 1), 20 - index)
        ids = [block.host_id for block in table if block.request == request]
        assert ids == list(range(ids[0], ids[0] + 20))
