"""Who is silent for too long, and who is not to blame."""

from pipemax.coordinator.liveness import OWN_GAP_SHARE, Liveness

MOST_S = 10.0
LOOK_S = MOST_S * OWN_GAP_SHARE / 2


def look(
    liveness: Liveness, begin_s: float, end_s: float, *beating: str
) -> list[tuple[str, float]]:
    """Looks again and again, while `beating` processes beat."""
    found: list[tuple[str, float]] = []
    now = begin_s
    while now <= end_s:
        for process in beating:
            liveness.heard(process, now)
        found += liveness.silent(now)
        now += LOOK_S
    return found


def test_who_falls_silent_is_told_once() -> None:
    liveness = Liveness(MOST_S)
    liveness.heard("stage-0", 0.0)
    liveness.heard("stage-1", 0.0)
    (told,) = look(liveness, 0.0, 100.0, "stage-1")
    assert told[0] == "stage-0"
    assert MOST_S < told[1] <= MOST_S + 2 * LOOK_S
    liveness.heard("stage-0", 101.0)
    assert [name for name, _ in look(liveness, 101.0, 130.0, "stage-1")] == ["stage-0"]


def test_nothing_is_expected_of_who_loads() -> None:
    liveness = Liveness(MOST_S)
    assert look(liveness, 0.0, 50.0) == []
    liveness.heard("stage-0", 50.0)
    liveness.forget("stage-0")
    assert look(liveness, 50.0, 100.0) == []


def test_a_pause_of_our_own_blames_nobody() -> None:
    liveness = Liveness(MOST_S)
    liveness.heard("stage-0", 0.0)
    assert look(liveness, 0.0, 5.0) == []
    assert look(liveness, 500.0, 509.0) == []
    assert [name for name, _ in look(liveness, 509.0, 515.0)] == ["stage-0"]
