"""Which cores a stage keeps to."""

import logging
import os
import threading
from pathlib import Path

import pytest

from pipemax.stage_worker import cores
from pipemax.stage_worker.cores import pin_to_share, places_of, share_of

TWO_SOCKETS = {cpu: (cpu // 4 % 2, cpu % 4) for cpu in range(16)}
"""Two sockets of four cores; CPUs 8 to 15 are the cores' second threads."""
SIBLINGS_SIDE_BY_SIDE = {cpu: (0, cpu // 2) for cpu in range(8)}


def shares(places: dict[int, tuple[int, int]], stages: int, threads: int) -> list[object]:
    return [share_of(places, stage, stages, threads) for stage in range(stages)]


def test_stages_share_no_cpu_and_no_core_while_there_are_others() -> None:
    assert shares(SIBLINGS_SIDE_BY_SIDE, 2, 2) == [(0, 2), (4, 6)]
    assert shares(SIBLINGS_SIDE_BY_SIDE, 2, 4) == [(0, 2, 4, 6), (1, 3, 5, 7)]
    assert shares(TWO_SOCKETS, 2, 4) == [(0, 1, 2, 3), (4, 5, 6, 7)]


def test_a_stage_stays_on_one_socket() -> None:
    mixed = {0: (0, 0), 1: (1, 0), 2: (0, 1), 3: (1, 1)}
    assert shares(mixed, 2, 2) == [(0, 2), (1, 3)]


def test_too_few_cores_are_not_shared_out() -> None:
    assert shares(SIBLINGS_SIDE_BY_SIDE, 3, 3) == [None] * 3


def test_places_are_read_from_the_kernel(tmp_path: Path) -> None:
    folder = tmp_path / "cpu3" / "topology"
    folder.mkdir(parents=True)
    (folder / "physical_package_id").write_text("1\n")
    (folder / "core_id").write_text("7\n")
    places = places_of([3, 4, 5], tmp_path)
    assert places[3] == (1, 7)
    assert len(set(places.values())) == 3  # of 4 and 5 nothing is known


@pytest.fixture
def affinity() -> set[int]:
    return os.sched_getaffinity(0)


def test_a_thread_and_those_it_starts_are_pinned(affinity: set[int]) -> None:
    seen: list[set[int]] = []

    def stage() -> None:
        pin_to_share(len(affinity) - 1, len(affinity), 1)
        child = threading.Thread(target=lambda: seen.append(os.sched_getaffinity(0)))
        child.start()
        child.join()

    thread = threading.Thread(target=stage)
    thread.start()
    thread.join()
    assert len(seen[0]) == 1
    assert os.sched_getaffinity(0) == affinity


def test_where_cores_do_not_go_round_nothing_changes(
    affinity: set[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cores.os, "sched_setaffinity", None)
    with caplog.at_level(logging.WARNING):
        pin_to_share(0, len(affinity) + 1, 1)
    assert "not pinned" in caplog.text
