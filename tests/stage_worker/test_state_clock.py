"""Every moment belongs to exactly one state."""

import math

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
