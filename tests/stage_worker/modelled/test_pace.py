"""Deadlines of modelled steps, with a clock that only the test moves."""

import pytest

from pipemax.stage_worker.modelled.pace import Pace
from pipemax.stage_worker.state_clock import State, StateClock

OVERSLEEP_S = 0.25


class World:
    """Time in seconds; sleeping takes a little longer than asked for."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.clock = StateClock(lambda: round(self.now_s * 1e9), "prepare")
        self.pace = Pace(self.clock, lambda: self.now_s, self.sleep)

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now_s += seconds + OVERSLEEP_S

    def spend(self, state: State, seconds: float) -> None:
        self.clock.switch(state)
        self.now_s += seconds

    def step(self, duration_s: float, work_s: float = 0.5, arrived_s: float | None = None) -> float:
        """A step whose own work takes `work_s`; its end by the model."""
        self.clock.switch("compute")
        begin_s = self.pace.begin(arrived_s)
        self.now_s += work_s
        return self.pace.end(begin_s + duration_s)


@pytest.fixture
def world() -> World:
    return World()


def test_steps_without_waits_follow_each_other_without_a_gap(world: World) -> None:
    ends = []
    for _ in range(5):
        ends.append(world.step(10.0))
        world.spend("send", 1.0)
        world.spend("prepare", 1.0)
    assert ends == [110.0, 120.0, 130.0, 140.0, 150.0]
    assert world.now_s == pytest.approx(150.0 + OVERSLEEP_S + 2.0)


def test_a_wait_for_a_plan_or_for_kv_delays_the_step(world: World) -> None:
    world.step(10.0)
    world.spend("send", 1.0)
    world.spend("wait_plan", 3.0)
    assert world.step(10.0) == pytest.approx(123.0)
    world.spend("wait_kv", 4.0)
    assert world.step(10.0) == pytest.approx(137.0)


def test_rows_count_from_when_they_arrived_by_the_model(world: World) -> None:
    """However late this process heard of them."""
    world.step(10.0)
    world.spend("wait_activation", 7.0)
    assert world.step(10.0, arrived_s=112.0) == pytest.approx(122.0)
    world.spend("wait_activation", 7.0)
    assert world.step(10.0, arrived_s=119.0) == pytest.approx(132.0)


def test_waits_for_rows_and_for_kv_add_up(world: World) -> None:
    world.step(10.0)
    world.spend("wait_activation", 2.0)
    world.spend("wait_kv", 3.0)
    assert world.step(10.0, arrived_s=111.0) == pytest.approx(125.0)


def test_a_process_slower_than_the_model_stays_so_and_does_not_catch_up(world: World) -> None:
    assert world.step(10.0, work_s=30.0) == 130.0
    assert world.step(10.0, work_s=0.5) == 140.0


def test_waiting_for_a_moment_that_has_passed_takes_no_time(world: World) -> None:
    world.pace.wait_until(99.0)
    assert world.now_s == 100.0
    world.pace.wait_until(101.0)
    assert world.now_s == 101.0 + OVERSLEEP_S
