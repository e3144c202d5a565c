"""The imitated link, on a clock of the test's own."""

import pytest

from pipemax.kv_daemon.pacing import CATCH_UP_S, LinkPacer


def test_copies_that_follow_each_other_keep_the_rate_however_late_threads_wake() -> None:
    pacer = LinkPacer(1000.0)
    now = 5.0
    for late in [0.0, 0.003, 0.001, CATCH_UP_S * 0.9] * 25:
        begin, deadline = pacer.begin(now, 20)
        pacer.end(begin, deadline, copied_at=begin + 0.001)
        now = deadline + late
    assert deadline == pytest.approx(5.0 + 100 * 20 / 1000.0)
    assert pacer.busy_s == pytest.approx(2.0)


def test_an_idle_link_saves_nothing_up() -> None:
    pacer = LinkPacer(1000.0)
    pacer.end(*pacer.begin(1.0, 100), copied_at=1.0)
    begin, deadline = pacer.begin(9.0, 100)
    assert (begin, deadline) == (9.0, pytest.approx(9.1))


def test_memory_slower_than_the_link_counts_as_it_is() -> None:
    pacer = LinkPacer(1000.0)
    begin, deadline = pacer.begin(1.0, 100)
    pacer.end(begin, deadline, copied_at=1.5)
    assert pacer.busy_s == pytest.approx(0.5)
    assert pacer.begin(1.5, 100) == (1.5, pytest.approx(1.6))


def test_without_a_rate_copies_take_as_long_as_they_take() -> None:
    pacer = LinkPacer(None)
    begin, deadline = pacer.begin(2.0, 10**9)
    assert begin == deadline == 2.0
    pacer.end(begin, deadline, copied_at=2.25)
    assert pacer.busy_s == pytest.approx(0.25)
