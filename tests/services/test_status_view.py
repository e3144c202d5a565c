"""The status table: shares, rates, and words a person can act on."""

import io
import re
from typing import Any

import msgspec
import pytest
from rich.console import Console

from pipemax.proto.messages.ingest import SamplerStatus, StageStatus, Status
from pipemax.proto.rundir import run_dir_of
from pipemax.services.status_view import stage_table, state_shares, status_view


def stage(pid: int = 1, **seconds: float) -> StageStatus:
    return StageStatus(
        stage=0, pid=pid, layers=(0, 3), state_seconds=seconds, steps=4, activation_transport="shm"
    )


def status(**changes: Any) -> Status:
    zeros = dict.fromkeys(Status.__struct_fields__, 0)
    known = {
        "instance_id": "i",
        "phase": "ready",
        "model_name": "tiny",
        "missing": (),
        "stages": (stage(compute=3.0, wait_kv=1.0),),
    }
    return Status(**(zeros | known | changes))


def text(view: object, width: int = 200) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(view)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_shares_sum_to_one_and_follow_the_last_interval() -> None:
    before, after = stage(compute=3.0, wait_kv=1.0), stage(compute=4.0, wait_kv=4.0)
    assert state_shares(after) == {"compute": 0.5, "wait_kv": 0.5}
    assert state_shares(after, before) == {"compute": 0.25, "wait_kv": 0.75}
    assert state_shares(after, after) == {}
    assert state_shares(stage()) == {}


def test_samplers_are_shown_where_there_are_any() -> None:
    assert "sampler" not in text(status_view("mine", status(samplers=())))
    seconds = {"sample": 1.0, "wait": 3.0}
    sampler = SamplerStatus(sampler=1, pid=7, rows=12345, state_seconds=seconds)
    shown = text(status_view("mine", status(samplers=(sampler,))))
    assert re.search(r"sampler-1\s+12345\s+25\.0%", shown)


def test_a_restarted_stage_is_not_compared_with_its_predecessor() -> None:
    before = status(stages=(stage(pid=1, compute=90.0),))
    after = status(stages=(stage(pid=2, compute=1.0, send=1.0),))
    assert text(stage_table(after, before)).count("50.0%") == 2


def test_summary_shows_requests_tiers_and_bytes() -> None:
    shown = text(
        status_view(
            "mine",
            status(
                requests_running=3,
                requests_waiting=5,
                device_blocks_total=10,
                device_blocks_used=4,
                host_blocks_total=0,
                load_bytes=3 * 2**20,
                load_seconds=1.5,
                uptime_s=3725.0,
            ),
        )
    )
    assert "mine: ready, up 1 h 02 min" in shown
    assert str(run_dir_of("mine")) in shown
    assert "3 running, 5 waiting" in shown
    assert "4 of 10 blocks (40%)" in shown
    assert "0 of 0 blocks" in shown
    assert "0 of 0 blocks (" not in shown
    assert "3.0 MiB, 2.0 MiB/s while copying" in shown
    assert "75.0%" in shown
    assert "recoveries" not in shown


def test_a_stage_that_has_not_reported_has_no_layers() -> None:
    unknown = StageStatus(
        stage=1, pid=0, layers=(0, 0), state_seconds={}, steps=0, activation_transport=""
    )
    assert text(stage_table(status(stages=(unknown,)))).splitlines()[1].split()[:3] == [
        "stage-1",
        "–",
        "0",
    ]


def test_stages_on_gpus_say_on_which_and_who_copies() -> None:
    on_gpu = msgspec.structs.replace(
        stage(compute=1.0), device="GPU 1 Simulated", activation_transport="ipc", kv_copies="stage"
    )
    heading, row = text(stage_table(status(stages=(on_gpu,)))).splitlines()
    assert heading.split()[-6:] == ["device", "activations", "by", "KV", "copied", "by"]
    assert row.split()[-5:] == ["GPU", "1", "Simulated", "ipc", "stage"]
    assert "device" not in text(stage_table(status()))


def test_missing_processes_and_recoveries_are_named() -> None:
    shown = text(status_view("x", status(phase="recovering", missing=("stage-1",), epoch=3)))
    assert "recovering, waiting for stage-1" in shown
    assert "recoveries" in shown


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"uptime_s": 12.0, "generation_tokens": 300}, "now 0 in/s, 100 out/s"),
        ({"uptime_s": 12.0, "instance_id": "another"}, None),
        ({"uptime_s": 10.0}, None),
    ],
)
def test_rates_are_those_since_the_last_look(changes: dict[str, Any], expected: str | None) -> None:
    before = status(uptime_s=10.0, generation_tokens=100)
    shown = text(status_view("x", status(**changes), before))
    assert ("now" in shown) == (expected is not None)
    assert expected is None or expected in shown


@pytest.mark.parametrize("width", [40, 60, 80])
def test_a_narrow_terminal_loses_nothing(width: int) -> None:
    assert "…" not in text(status_view("x", status()), width)
