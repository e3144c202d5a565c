"""Every moment belongs to exactly one state."""

import math
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from pipemax.stage_worker.state_clock import STATES, State, StateClock

_Moves = st.lists(st.tuples(st.integers(0, 10**12), st.sampled_from(STATES)))


class _Now:
    def __init__(self) -> None:
        self.ns = 10**15

    def __call__(self) -> int:
        return self.ns


@given(_Moves, st.integers(0, 10**12))
def test_states_sum_to_wall_time(moves: list[tuple[int, State]], tail_ns: int) -> None:
    now = _Now()
    clock = StateClock(now)
    started_ns = now.ns
    for elapsed_ns, state in moves:
        now.ns += elapsed_ns
        clock.switch(state)
    now.ns += tail_ns
    seconds = clock.seconds()
    assert set(seconds) == set(STATES)
    assert all(value >= 0 for value in seconds.values())
    assert math.isclose(sum(seconds.values()), (now.ns - started_ns) / 1e9, abs_tol=1e-6)


@given(_Moves)
def test_time_goes_to_the_state_it_was_spent_in(moves: list[tuple[int, State]]) -> None:
    now = _Now()
    clock = StateClock(now, "send")
    expected = dict.fromkeys(STATES, 0)
    current: State = "send"
    for elapsed_ns, state in moves:
        now.ns += elapsed_ns
        expected[current] += elapsed_ns
        assert clock.switch(state) == elapsed_ns / 1e9
        current = state
    assert clock.seconds() == {state: ns / 1e9 for state, ns in expected.items()}


def test_reading_changes_nothing() -> None:
    now = _Now()
    clock = StateClock(now)
    clock.switch("compute")
    now.ns += 5 * 10**9
    assert clock.seconds() == clock.seconds()
    now.ns += 10**9
    assert clock.switch("send") == 6.0


_Told = st.lists(st.tuples(st.sampled_from(STATES), st.integers(-(10**6), 10**11)), max_size=4)
_Action = st.one_of(
    st.tuples(st.just("switch"), st.sampled_from(STATES)),
    st.tuples(st.just("take_off"), st.none()),
    st.tuples(st.just("settle"), st.tuples(_Told, st.booleans())),
)


@given(st.lists(st.tuples(st.integers(0, 10**11), _Action)))
def test_in_flight_no_second_is_counted_twice_nor_taken_back(
    moves: list[tuple[int, tuple[str, Any]]],
) -> None:
    """Whatever a device tells: counters never go back, and sum to the wall time once landed."""
    now = _Now()
    clock = StateClock(now)
    started_ns = now.ns
    before = clock.seconds()
    for elapsed_ns, (action, argument) in moves:
        now.ns += elapsed_ns
        if action == "switch":
            clock.switch(argument)
        elif action == "take_off":
            clock.take_off()
        elif clock.in_flight:
            told, landed = argument
            clock.settle([(state, ns / 1e9) for state, ns in told], landed=landed)
            assert clock.in_flight is not landed
        after = clock.seconds()
        assert all(after[state] >= before[state] for state in STATES)
        wall_s = (now.ns - started_ns) / 1e9
        if clock.in_flight:
            assert sum(after.values()) <= wall_s + 1e-6
        else:
            assert math.isclose(sum(after.values()), wall_s, abs_tol=1e-6)
        before = after


def test_time_in_flight_goes_to_what_the_device_tells() -> None:
    now = _Now()
    clock = StateClock(now, "prepare")
    now.ns += 2 * 10**9
    clock.take_off()
    now.ns += 10 * 10**9
    clock.switch("wait_plan")
    assert clock.seconds() == {**dict.fromkeys(STATES, 0.0), "prepare": 2.0}
    clock.settle([("wait_activation", 3.0), ("compute", 5.0)], landed=False)
    assert sum(clock.seconds().values()) == 10.0, "two seconds belong to a step that is not over"
    now.ns += 4 * 10**9
    clock.settle([("wait_kv", 1.0), ("compute", 4.5)], landed=True)
    now.ns += 7 * 10**9
    assert clock.seconds() == {
        "prepare": 2.0,
        "wait_activation": 3.0,
        "wait_kv": 1.0,
        "compute": 9.5,
        "send": 0.5,
        "wait_plan": 7.0,
    }


def test_what_a_device_tells_ahead_of_our_clock_waits() -> None:
    now = _Now()
    clock = StateClock(now)
    clock.take_off()
    now.ns += 10**9
    clock.settle([("compute", 1.5)], landed=False)
    assert clock.seconds()["compute"] == 1.0
    now.ns += 10**9
    clock.settle([("wait_kv", 0.5)], landed=False)
    assert (clock.seconds()["compute"], clock.seconds()["wait_kv"]) == (1.5, 0.5)
