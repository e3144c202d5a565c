"""How a stage waits for messages, on a clock of its own."""

from typing import Any

import pytest

from pipemax.stage_worker.waiting import SpinThenBlock

READY = [("socket", 1)]


class World:
    """A poller whose message comes at `at_s`; every look takes 0.1 s, every turn of others 0.4."""

    def __init__(self, at_s: float) -> None:
        self.now_s, self.at_s = 100.0, 100.0 + at_s
        self.slept_ms: list[int] = []
        self.turns = 0

    def poll(self, timeout: int) -> list[tuple[Any, int]]:
        self.now_s += 0.1
        if timeout:
            self.slept_ms.append(timeout)
            self.now_s = max(self.now_s, min(self.at_s, self.now_s + timeout / 1e3))
        return READY if self.now_s >= self.at_s else []

    def give_way(self) -> None:
        self.turns += 1
        self.now_s += 0.4

    def wait(self, spin_s: float, timeout_s: float) -> list[tuple[Any, int]]:
        return SpinThenBlock(self, spin_s, lambda: self.now_s, self.give_way).poll(timeout_s)


def test_what_comes_soon_is_met_awake() -> None:
    world = World(at_s=1.3)
    assert world.wait(spin_s=2.0, timeout_s=9.0) == READY
    assert world.slept_ms == []
    assert world.turns == 3  # others on the same core had theirs


def test_what_comes_late_is_slept_for() -> None:
    world = World(at_s=7.0)
    assert world.wait(spin_s=2.0, timeout_s=9.0) == READY
    assert world.turns == 4
    assert world.slept_ms == [7000]


@pytest.mark.parametrize("timeout_s", [1.0, 9.0])
def test_nobody_waits_longer_than_asked(timeout_s: float) -> None:
    world = World(at_s=1000.0)
    assert world.wait(spin_s=2.0, timeout_s=timeout_s) == []
    assert world.now_s - 100.0 == pytest.approx(timeout_s, abs=0.3)


def test_without_spinning_it_sleeps_at_once() -> None:
    world = World(at_s=3.0)
    assert world.wait(spin_s=0.0, timeout_s=9.0) == READY
    assert world.turns == 0
    assert world.slept_ms == [9000]


def test_a_look_neither_spins_nor_sleeps() -> None:
    world = World(at_s=3.0)
    assert world.wait(spin_s=2.0, timeout_s=0.0) == []
    assert (world.turns, world.slept_ms) == (0, [])
