"""Full collections wait until nothing runs."""

from pipemax.coordinator.garbage import BUSY_INTERVAL_S, IDLE_INTERVAL_S, Garbage


def test_full_collections_wait_until_nothing_runs_but_not_for_ever() -> None:
    times: list[float] = []
    now = 0.0
    garbage = Garbage(now, lambda: times.append(now))
    for now, is_busy in (
        (IDLE_INTERVAL_S, False),  # nothing ever ran
        (IDLE_INTERVAL_S + 1, True),
        (2 * IDLE_INTERVAL_S, True),
        (2 * IDLE_INTERVAL_S + 1, False),  # due, and nothing runs
        (2 * IDLE_INTERVAL_S + 2, False),
        (9 * IDLE_INTERVAL_S, False),  # nothing ran since
        (10 * IDLE_INTERVAL_S, True),
        (BUSY_INTERVAL_S, True),
        (BUSY_INTERVAL_S + 2 * IDLE_INTERVAL_S, True),
        (BUSY_INTERVAL_S + 2 * IDLE_INTERVAL_S + 1, True),
    ):
        garbage.tick(now, is_busy=is_busy)
    assert times == [2 * IDLE_INTERVAL_S + 1, BUSY_INTERVAL_S + 2 * IDLE_INTERVAL_S + 1]
