"""The limit: by hand, and beside every schedule there is."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipemax.services.bench.limit import (
    DecoderCost,
    MachineRates,
    _least_products_s,
    ideal_rows,
    limit_of,
    rows_under_cap,
)
from pipemax.services.bench.work import BenchRequest

COST = DecoderCost(
    layer_parameters=900.0,
    head_parameters=100.0,
    kv_token_bytes=40.0,
    pair_flop=8.0,
    weight_element_bytes=2.0,
)
RATES = MachineRates({1: 1000.0, 2: 1600.0, 4: 2000.0}, read_bytes_s=1000.0)
"""A step of 1, 2 and 4 rows computes for 2, 2.5 and 4 s; the weights take 2 s to read."""


def request(prompt: int, output: int) -> BenchRequest:
    return BenchRequest(list(range(prompt)), output)


def test_by_hand() -> None:
    """Two requests: 3 and 1 decode steps. Together once, then one alone twice: 2.5 + 2 + 2 s; one
    after the other would be 4 steps of 2 s."""
    found = limit_of([request(10, 4), request(5, 2)], COST, RATES)
    assert (found.steps, found.most_requests) == (3, 2)
    assert found.products_s == pytest.approx(6.5)
    # Contexts 11, 12, 13 of the first and 6 of the second, 40 bytes each.
    assert found.kv_s == pytest.approx(40 * (11 + 12 + 13 + 6) / 1000)
    # 1800 a token, 8 for each of 55 and 15 pairs, 200 for each head.
    assert found.prompts_s == pytest.approx((1800 * 15 + 8 * (55 + 15) + 200 * 2) / 2000)
    assert found.seconds == pytest.approx(6.5 + 1.68 + 13.98)
    assert found.bound_s <= found.seconds


def test_fewer_at_once_take_longer() -> None:
    work = [request(1, 5)] * 4
    both, alone = limit_of(work, COST, RATES, 2), limit_of(work, COST, RATES, 1)
    assert both.products_s == pytest.approx(8 * 2.5)
    assert alone.products_s == pytest.approx(16 * 2.0)
    assert limit_of(work, COST, RATES).products_s == pytest.approx(4 * 4.0)


def test_a_single_output_token_takes_no_step() -> None:
    found = limit_of([request(4, 1)], COST, RATES)
    assert (found.steps, found.products_s, found.kv_s) == (0, 0.0, 0.0)
    assert found.seconds == found.bound_s == found.prompts_s


def test_times_between_measured_rows_are_interpolated_and_rates_go_on_beyond() -> None:
    rows = np.array([1.0, 1.5, 3.0, 4.0, 8.0])
    assert RATES.products_s(rows, 2000.0).tolist() == pytest.approx([2, 2.25, 3.25, 4, 8])


def test_the_longest_go_first() -> None:
    assert rows_under_cap([5, 1, 1, 1], 2).tolist() == [2, 2, 2, 1, 1]
    assert rows_under_cap([2, 2, 2], 2).tolist() == [2, 2, 2]
    assert rows_under_cap([3, 3, 1], 8).tolist() == [3, 2, 2]
    assert rows_under_cap([], 2).tolist() == []


def longest_first(steps: Sequence[int], cap: int) -> list[int]:
    """The same by playing it through."""
    left = sorted(steps, reverse=True)
    rows = []
    while any(left):
        taking = sum(1 for count in left[:cap] if count)
        left = sorted([*(n - 1 for n in left[:taking]), *left[taking:]], reverse=True)
        rows.append(taking)
    return rows


def every_schedule(steps: Sequence[int], step_s: Sequence[float]) -> float:
    """Seconds of the fastest of all schedules: each step takes any set of requests."""
    best: dict[tuple[int, ...], float] = {}

    def least(left: tuple[int, ...]) -> float:
        if not any(left):
            return 0.0
        if left not in best:
            alive = [index for index, count in enumerate(left) if count]
            options = []
            for chosen in range(1, 1 << len(alive)):
                taken = {one for at, one in enumerate(alive) if chosen >> at & 1}
                if len(taken) < len(step_s):
                    rest = tuple(sorted(n - (i in taken) for i, n in enumerate(left)))
                    options.append(step_s[len(taken)] + least(rest))
            best[left] = min(options)
        return best[left]

    return least(tuple(sorted(steps)))


SMALL = st.lists(st.integers(0, 4), min_size=1, max_size=5)


@given(SMALL, st.integers(1, 5))
def test_the_closed_form_is_what_longest_first_does(steps: list[int], cap: int) -> None:
    assert [n for n in rows_under_cap(steps, cap).tolist() if n] == longest_first(steps, cap)


@given(SMALL, st.lists(st.floats(0.01, 1), min_size=1, max_size=5))
def test_no_schedule_is_faster_where_more_rows_pay(steps: list[int], more: list[float]) -> None:
    """Each further row adds less than the one before: as products do below the knee."""
    step_s = np.concatenate([[0.0], np.cumsum(sorted(more, reverse=True))])
    _, seconds = ideal_rows(steps, step_s)
    assert seconds == pytest.approx(every_schedule(steps, step_s.tolist()))


@given(SMALL, st.lists(st.floats(0.01, 1), min_size=1, max_size=5), st.floats(0.0, 2.0))
def test_the_bound_is_below_every_schedule_and_ours_is_one(
    steps: list[int], more: list[float], weights_s: float
) -> None:
    step_s = np.concatenate([[0.0], np.maximum(np.cumsum(more), weights_s)])
    _, seconds = ideal_rows(steps, step_s)
    best = every_schedule(steps, step_s.tolist())
    assert _least_products_s(steps, step_s) <= best * (1 + 1e-9)
    assert best <= seconds * (1 + 1e-9)


def test_with_many_requests_bound_and_schedule_nearly_meet() -> None:
    draw = np.random.default_rng(1)
    work = [request(int(p), int(o)) for p, o in draw.integers(2, 300, (400, 2))]
    rates = MachineRates({1: 300.0, 32: 6000.0, 128: 9000.0, 512: 15000.0}, 9000.0)
    found = limit_of(work, COST, rates)
    assert 0.97 < found.bound_s / found.seconds <= 1
