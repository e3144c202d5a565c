"""`pipemax status --watch`: bars are right, and readable at every width and number of stages."""

import io
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from pipemax.proto.messages.ingest import (
    JobProgress,
    SamplerStatus,
    SlotStatus,
    StageStatus,
    Status,
)
from pipemax.proto.states import STATES
from pipemax.services.simulator.gantt import COLOURS as GANTT_COLOURS
from pipemax.services.status_watch import COLOURS, LETTERS, MOST_JOBS, WINDOW_S, Watch, cells


def stage(index: int, pid: int = 1, **seconds: float) -> StageStatus:
    zeros = dict.fromkeys(STATES, 0.0)
    return StageStatus(
        stage=index, pid=pid, layers=(0, 3), state_seconds=zeros | seconds, steps=4,
        activation_transport="shm",
    )  # fmt: skip


def status(uptime_s: float, *stages: StageStatus, **changes: Any) -> Status:
    zeros = dict.fromkeys(Status.__struct_fields__, 0)
    known = {
        "instance_id": "i",
        "phase": "ready",
        "model_name": "tiny",
        "missing": (),
        "samplers": (),
        "jobs": (),
        "slots": tuple(SlotStatus(requests=3, context_tokens=12_345) for _ in stages),
    }
    return Status(**(zeros | known | {"uptime_s": uptime_s, "stages": stages} | changes))


def job(name: str = "night", **changes: Any) -> JobProgress:
    known = {"state": "running", "num_requests": 40, "num_results": 10, "num_failed": 0}
    return JobProgress(name=name, **(known | changes))


def shown(view: object, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(view)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def bar_of(text: str, index: int) -> str:
    found = re.search(rf"^{index} +([CPAKRS]+) ", text, re.MULTILINE)
    assert found is not None, text
    return found.group(1)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=8), st.integers(0, 300))
def test_cells_fill_the_width_in_proportion(shares: list[float], width: int) -> None:
    found = cells(shares, width)
    assert sum(found) == (width if sum(shares) > 0 else 0)
    for share, one in zip(shares, found, strict=True):
        if sum(shares) > 0:
            assert abs(one - share / sum(shares) * width) < 1 + 1e-6


def test_a_bar_is_the_time_since_the_begin_of_the_window() -> None:
    watch = Watch("mine")
    watch.look(status(100.0, stage(0, compute=90.0)))
    watch.look(status(109.0, stage(0, compute=99.0)))
    text = shown(watch.look(status(113.0, stage(0, compute=101.0, wait_kv=2.0))))
    bar = bar_of(text, 0)
    assert set(bar) == {"C", "K"}
    assert bar.count("K") / len(bar) == pytest.approx(2 / 13, abs=1 / len(bar))
    assert "85% wait_kv 15%" in text
    text = shown(watch.look(status(113.5 + WINDOW_S, stage(0, compute=101.0, wait_kv=12.5))))
    assert set(bar_of(text, 0)) == {"K"}
    assert "no place holds the others up" in text


def test_it_says_who_holds_the_others_up() -> None:
    watch = Watch("mine")
    watch.look(status(1.0, stage(0), stage(1), requests_running=1))
    stages = (stage(0, wait_plan=8.0, compute=2.0), stage(1, compute=9.0, send=1.0))
    text = shown(watch.look(status(11.0, *stages, requests_running=1)))
    assert "the others wait for stage 1: compute 90%" in text


def test_a_restarted_stage_and_a_restarted_coordinator_begin_anew() -> None:
    watch = Watch("mine")
    watch.look(status(1.0, stage(0, pid=1, compute=1.0), generation_tokens=500))
    text = shown(watch.look(status(5.0, stage(0, pid=2, send=1.0), generation_tokens=900)))
    assert set(bar_of(text, 0)) == {"S"}
    assert "100 out per second" in text
    text = shown(watch.look(status(2.0, stage(0, compute=1.0), instance_id="j")))
    assert "since the start" in text


def test_before_a_stage_has_reported_there_is_room_for_its_bar() -> None:
    text = shown(Watch("x").look(status(0.1, stage(0), phase="starting", missing=("stage-0",))))
    assert "starting, waiting for stage-0" in text
    assert re.search(r"^0 +–", text, re.MULTILINE)


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("stages", [1, 2, 8])
def test_nothing_is_lost_or_wrapped_apart(stages: int, width: int) -> None:
    def at(moment: float) -> Status:
        seconds = {state: moment * (2 + index) for index, state in enumerate(STATES)}
        return status(
            moment * 27,
            *(stage(index, **seconds) for index in range(stages)),
            device_blocks_total=6000,
            device_blocks_used=4000,
            host_blocks_total=22000,
            samplers=(SamplerStatus(sampler=0, pid=1, rows=9, state_seconds={"sample": moment}),),
            jobs=(job(eta_s=7260.0, num_failed=2),),
        )

    watch = Watch("default")
    watch.look(at(1.0))
    text = shown(watch.look(at(1.2)), width)
    assert max(map(len, text.splitlines())) <= width
    legend = " ".join(text.split())
    for state in STATES:
        assert f"{LETTERS[state]} {state}" in legend
    for index in range(stages):
        assert set(bar_of(text, index)) == set(LETTERS.values())
    assert text.count("3/12.3k") == stages
    assert "4000 of 6000 blocks" in legend
    for word in ("10 of 40", "2 errors", "2 h 01 min left", "0 busy 100%"):
        assert word in legend


def test_of_many_jobs_the_first_are_shown() -> None:
    text = shown(Watch("x").look(status(1.0, jobs=tuple(job(f"j{n}") for n in range(20)))))
    assert f"job j{MOST_JOBS - 1}" in text
    assert f"job j{MOST_JOBS} " not in text
    assert f"and {20 - MOST_JOBS} more jobs" in text


def test_states_have_their_letters_and_the_colours_they_have_elsewhere() -> None:
    assert set(LETTERS) == set(COLOURS) == set(STATES)
    assert len(set(LETTERS.values())) == len(STATES)
    assert {s: COLOURS[s][0] for s in STATES} == {s: GANTT_COLOURS[s] for s in STATES}


@pytest.mark.parametrize("state", STATES)
def test_letters_can_be_read_on_their_colours(state: str) -> None:
    """WCAG's contrast of text that is not small: 3 to 1."""

    def luminance(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted(map(luminance, COLOURS[state]))
    assert (light + 0.05) / (dark + 0.05) >= 3
