"""Allocator, selection policy and link budget on their own."""

from hypothesis import given
from hypothesis import strategies as st

from pipemax.coordinator.device_blocks import DeviceBlocks
from pipemax.coordinator.link_budget import LINK_EFFICIENCY, UNLIMITED, LinkBudget
from pipemax.coordinator.policy import Candidate, OldestFirst, SlotTarget


def test_copies_get_blocks_no_step_in_flight_uses() -> None:
    blocks = DeviceBlocks(6)
    taken = blocks.take_for_write(6)
    assert taken is not None
    blocks.release(taken[:2], ready_after=5)
    blocks.release(taken[2:4], ready_after=7)
    assert blocks.take_for_copy(3, latest_step=6) is None
    assert blocks.take_for_copy(2, latest_step=6) == (sorted(taken[:2], reverse=False), 5)
    blocks.settle(7)
    assert blocks.take_for_copy(2, latest_step=6) == (taken[2:4], -1)


def test_writes_take_the_blocks_copies_would_have_to_wait_for() -> None:
    blocks = DeviceBlocks(4)
    taken = blocks.take_for_write(2)
    assert taken is not None
    blocks.release(taken, ready_after=9)
    assert set(blocks.take_for_write(2) or ()) == set(taken)
    assert blocks.num_ready(0) == 2


@given(st.data())
def test_blocks_are_neither_lost_nor_given_twice(data: st.DataObject) -> None:
    total = data.draw(st.integers(1, 30))
    blocks = DeviceBlocks(total)
    held: list[int] = []
    step = 0
    for _ in range(data.draw(st.integers(0, 40))):
        count = data.draw(st.integers(0, 8))
        action = data.draw(st.sampled_from(["write", "copy", "release", "settle"]))
        if action == "write":
            held += blocks.take_for_write(count) or []
        elif action == "copy":
            taken = blocks.take_for_copy(count, step)
            held += taken[0] if taken else []
            assert taken is None or taken[1] <= step
        elif action == "release":
            step += 1
            blocks.release(held[:count], step)
            del held[:count]
        else:
            blocks.settle(data.draw(st.integers(0, step)))
        blocks.check()
        assert sorted(held + blocks.free_blocks()) == list(range(total))


@given(
    st.lists(st.tuples(st.integers(-1, 50), st.integers(1, 20)), max_size=20),
    st.integers(0, 60),
    st.integers(-5, 60),
)
def test_prefetch_stays_within_budget_and_never_passes_over_the_oldest(
    pairs: list[tuple[int, int]], budget: int, free: int
) -> None:
    candidates = [Candidate(key, turn, load, load * 16) for key, (turn, load) in enumerate(pairs)]
    chosen = OldestFirst().choose_prefetch(candidates, budget, free)
    loads = {c.key: c.load_blocks for c in candidates}
    assert sum(loads[key] for key in chosen) <= max(0, min(budget, free))
    by_wait = sorted(candidates, key=lambda c: (c.last_turn, c.key))
    assert chosen == [c.key for c in by_wait[: len(chosen)]]
    if len(chosen) < len(candidates):
        assert sum(loads[k] for k in chosen) + by_wait[len(chosen)].load_blocks > min(budget, free)


def test_residents_even_out_the_count() -> None:
    candidates = [Candidate(key, 10 - key, 0, 16) for key in range(6)]
    chosen = OldestFirst().choose_residents(candidates, candidates[:1], SlotTarget(3, 48))
    assert chosen == [5, 4]


def test_budget_is_the_slowest_links_share_of_a_step() -> None:
    budget = LinkBudget([100, 200])
    assert budget.grant(10) >= UNLIMITED
    for stage, (rate, step_s) in enumerate([(1e6, 0.01), (1e6, 0.02)]):
        budget.link_measured(stage, int(rate), 1.0)
        budget.step_measured(stage, 0, step_s)
    assert budget.per_step == LINK_EFFICIENCY * 1e6 * 0.01 / 100
    assert budget.grant(10) == LINK_EFFICIENCY * 1e6 * 0.01 / 100


def test_the_window_is_the_predicted_time_of_the_steps_before_less_what_is_queued() -> None:
    budget = LinkBudget([100, 100])
    for stage in range(2):
        budget.link_measured(stage, 1000, 1.0)  # 9 blocks a second
        budget.step_measured(stage, 0, 1.0)
    budget.step_planned(1, [2.0, 3.0])
    assert budget.grant(0) == 18  # stage 0 computes step 1 meanwhile
    budget.prefetch_ordered(2, 18)
    budget.step_planned(2, [4.0, 5.0])
    assert budget.grant(0) == 36  # stage 0: 6 s, less the 18; stage 1: 8 s, less the 18
    budget.step_measured(0, 1, 2.0)
    assert budget.grant(0) == 36  # stage 0 computes step 2, whose KV is there
    budget.step_measured(0, 2, 4.0)
    budget.step_measured(1, 1, 3.0)
    assert budget.grant(0) == int(9 * budget_usual(1.0, 2.0, 4.0))  # stage 0 has nothing planned


def budget_usual(first: float, *others: float) -> float:
    mean = first
    for value in others:
        mean += 0.2 * (value - mean)
    return mean


def test_unused_budget_adds_up_to_one_large_request_and_no_further() -> None:
    budget = LinkBudget([100])
    budget.link_measured(0, 1000, 1.0)
    budget.step_measured(0, 0, 0.5)  # 4.5 blocks a step
    grants = []
    for step in range(1, 9):
        grants.append(budget.grant(20))
        budget.step_planned(step, [0.5])
        budget.step_measured(0, step, 0.5)
    assert grants == [4, 9, 13, 18, 20, 20, 20, 20]
    budget.grant(20)
    budget.prefetch_ordered(9, 20)
    budget.step_planned(9, [0.5])
    budget.step_measured(0, 9, 0.5)
    assert budget.grant(20) <= 9
