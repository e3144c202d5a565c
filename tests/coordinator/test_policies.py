"""The policies by name: what each promises, and what none may do."""

import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipemax.coordinator.cost_model import LinearCost
from pipemax.coordinator.link_budget import LINK_EFFICIENCY, LinkBudget
from pipemax.coordinator.policy import (
    DEFAULT_POLICY,
    MIN_OVERDUE_TURNS,
    Candidate,
    CountBalanced,
    FirstComeFirstServed,
    OldestFirst,
    Outlook,
    PipemaxPolicy,
    SlotTarget,
    StaticPrefetch,
    make_policy,
)
from pipemax.proto.config import EngineConfig
from pipemax.proto.errors import ConfigError

NAMES = ("oldest-first", "pipemax", "fcfs", "count-balanced", "static-prefetch:0.1")
COST = LinearCost(0.02, 1e-4, 1e-6)


def on_host(key: int, last_turn: int, load_blocks: int) -> Candidate:
    return Candidate(key, last_turn, load_blocks, 16 * load_blocks)


def measured_target(requests: int, context_tokens: int, turn: int = 100) -> SlotTarget:
    return SlotTarget(
        requests,
        context_tokens,
        max_requests=64,
        turn=turn,
        num_slots=4,
        device_blocks=1000,
        block_size=16,
        cost=COST,
        blocks_per_s=2000.0,
    )


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("oldest-first", OldestFirst),
        ("pipemax", PipemaxPolicy),
        ("fcfs", FirstComeFirstServed),
        ("count-balanced", CountBalanced),
        ("static-prefetch:0.25", StaticPrefetch),
    ],
)
def test_policies_are_made_by_name(name: str, kind: type) -> None:
    assert type(make_policy(name)) is kind


def test_one_default_everywhere() -> None:
    config = EngineConfig(model="", served_model_name="", layer_split=(1,), max_model_len=1)
    assert config.policy == DEFAULT_POLICY


@pytest.mark.parametrize("name", ["", "newest", "Pipemax", "fcfs:1", "pipemax:"])
def test_an_unknown_name_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(ConfigError, match=r"--policy .*: choose .*static-prefetch:<fraction>"):
        make_policy(name)


@pytest.mark.parametrize("text", ["", ":", ":0", ":-0.1", ":1.01", ":nan", ":inf", ":x"])
def test_a_fraction_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a fraction of the device blocks"):
        make_policy("static-prefetch" + text)


@given(
    name=st.sampled_from(NAMES),
    host=st.lists(st.tuples(st.integers(-1, 99), st.integers(1, 90)), max_size=30),
    device=st.lists(st.tuples(st.integers(-1, 99), st.integers(1, 90)), max_size=30),
    budget=st.integers(0, 300),
    free=st.integers(-5, 300),
    requests=st.integers(0, 20),
    is_measured=st.booleans(),
)
def test_no_policy_takes_more_than_there_is(
    name: str,
    host: list[tuple[int, int]],
    device: list[tuple[int, int]],
    budget: int,
    free: int,
    requests: int,
    is_measured: bool,
) -> None:
    policy = make_policy(name)
    waiting = [on_host(key, *one) for key, one in enumerate(host)]
    residents = [Candidate(100 + key, turn, 0, 16 * n) for key, (turn, n) in enumerate(device)]
    target = measured_target(requests, 500) if is_measured else SlotTarget(requests, 500)
    keys = policy.choose_prefetch(waiting, budget, free, Outlook(target, residents))
    loads = {c.key: c.load_blocks for c in waiting}
    room = free if name.startswith("static") else min(budget, free)
    assert sum(loads[key] for key in keys) <= max(0, room)
    chosen = [c for c in waiting if c.key in keys]
    more = policy.choose_residents(residents, chosen, target)
    assert set(more) <= {c.key for c in residents}
    for some in (keys, more):
        assert len(set(some)) == len(some)


@given(
    name=st.sampled_from(NAMES),
    host=st.lists(st.tuples(st.integers(-1, 99), st.integers(1, 90)), min_size=1, max_size=30),
    requests=st.integers(0, 20),
    is_measured=st.booleans(),
)
def test_something_is_prefetched_where_all_would_fit_and_nothing_else_can_run(
    name: str, host: list[tuple[int, int]], requests: int, is_measured: bool
) -> None:
    waiting = [on_host(key, *one) for key, one in enumerate(host)]
    target = measured_target(requests, 500) if is_measured else SlotTarget(requests, 500)
    largest = max(c.load_blocks for c in waiting)
    assert make_policy(name).choose_prefetch(waiting, largest, largest, Outlook(target))


@given(
    name=st.sampled_from(NAMES),
    device=st.lists(st.tuples(st.integers(-1, 99), st.integers(1, 90)), min_size=1, max_size=30),
    fixed_s=st.floats(0, 1),
    slope=st.sampled_from([0.0, 1e-9, 1e-4]),
)
def test_residents_get_their_turn_though_time_does_not_depend_on_them(
    name: str, device: list[tuple[int, int]], fixed_s: float, slope: float
) -> None:
    residents = [Candidate(key, turn, 0, 16 * n) for key, (turn, n) in enumerate(device)]
    target = SlotTarget(len(residents), 0, turn=100, cost=LinearCost(fixed_s, slope, 0.0))
    assert make_policy(name).choose_residents(residents, [], target)


def test_first_come_first_served_looks_at_arrival_only() -> None:
    waiting = [on_host(key, 10 - key, 5) for key in range(6)]
    assert FirstComeFirstServed().choose_prefetch(waiting[::-1], 17, 99) == [0, 1, 2]
    residents = [Candidate(key, 10 - key, 0, 16) for key in range(6)]
    chosen = FirstComeFirstServed().choose_residents(residents, waiting[:1], SlotTarget(3, 0))
    assert chosen == [0, 1]


def test_count_balanced_brings_no_more_than_an_even_count() -> None:
    waiting = [on_host(key, key, 1) for key in range(8)]
    outlook = Outlook(SlotTarget(3, 0, num_slots=4))
    assert CountBalanced().choose_prefetch(waiting, 100, 100, outlook) == [0, 1, 2, 3, 4]


def test_static_prefetch_takes_its_share_of_the_pool_whatever_the_budget() -> None:
    waiting = [on_host(key, key, 40) for key in range(8)]
    outlook = Outlook(measured_target(4, 4000))
    assert StaticPrefetch(0.1).choose_prefetch(waiting, 1, 500, outlook) == [0, 1]
    assert StaticPrefetch(0.01).choose_prefetch(waiting, 1, 500, outlook) == [0]
    assert StaticPrefetch(0.1).choose_prefetch(waiting, 1, 39, outlook) == []


def test_pipemax_fills_the_budget_that_oldest_first_leaves() -> None:
    waiting = [on_host(0, 80, 70), on_host(1, 81, 60), on_host(2, 82, 40)]
    outlook = Outlook(measured_target(2, 1500))
    assert set(PipemaxPolicy().choose_prefetch(waiting, 100, 500, outlook)) == {1, 2}
    assert PipemaxPolicy().choose_prefetch(waiting, 100, 500) == [0]  # nothing measured yet


def test_pipemax_serves_who_is_overdue_first() -> None:
    turn = 82 + MIN_OVERDUE_TURNS
    waiting = [on_host(0, 70, 70), on_host(1, 81, 60), on_host(2, 82, 40)]
    outlook = Outlook(measured_target(2, 1500, turn))
    assert PipemaxPolicy().choose_prefetch(waiting, 100, 500, outlook) == [0]


def test_pipemax_evens_out_step_times_where_counts_do_not() -> None:
    """Slots of lognormal contexts, filled one after the other from one pool: the spread of step
    times is a fraction of that of even counts."""
    spread = {}
    for name in ("count-balanced", "pipemax"):
        draw = random.Random(1)
        pool = [
            Candidate(key, key % 8, 0, round(draw.lognormvariate(6, 1))) for key in range(8 * 24)
        ]
        times = []
        for slot in range(8):
            left = sum(c.context_tokens for c in pool)
            requests = -(-len(pool) // (8 - slot))
            target = measured_target(requests, -(-left // (8 - slot)), turn=9)
            keys = set(make_policy(name).choose_residents(pool, [], target))
            chosen = [c for c in pool if c.key in keys]
            pool = [c for c in pool if c.key not in keys]
            times.append(COST.time_s(len(chosen), sum(c.context_tokens for c in chosen)))
        spread[name] = statistics.pstdev(times) / statistics.mean(times)
    assert spread["pipemax"] < 0.3 * spread["count-balanced"]


def test_a_link_whose_speed_varies_is_planned_with_less_than_its_mean() -> None:
    steady, varying = LinkBudget([100]), LinkBudget([100])
    assert steady.blocks_per_s is None
    for index in range(200):
        steady.link_measured(0, 1000, 1.0)
        varying.link_measured(0, 1500 if index % 2 else 500, 1.0)
    assert steady.blocks_per_s == pytest.approx(LINK_EFFICIENCY * 10)
    assert varying.blocks_per_s is not None
    assert 0.35 * 9 < varying.blocks_per_s < 0.65 * 9


def test_a_link_that_varies_wildly_is_still_used() -> None:
    budget = LinkBudget([100])
    for index in range(200):
        budget.link_measured(0, 100_000 if index % 20 == 0 else 100, 1.0)
    assert budget.blocks_per_s is not None
    assert budget.blocks_per_s > LINK_EFFICIENCY / 4  # of what it always carried
