"""`make gpu-check` itself: limits, table, JSON, exit status; with parts that are no checks."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gpu_findings
import psutil
import pytest
from gpu_check import check, machine, runner
from gpu_check.parts import PARTS, TOTAL_LIMIT_S, Part, Settings
from gpu_findings import Figure, Findings

from support.source_tree import ROOT

_FOUND = """
import os, subprocess, sys, time
from pathlib import Path
from gpu_findings import FindingsWriter
found = FindingsWriter(Path(sys.argv[1]))
"""


def part(name: str, script: str, limit_s: float = 30.0) -> Part:
    """Runs `script`, in which `found` is a FindingsWriter."""

    def command(settings: Settings) -> list[str]:
        return [sys.executable, "-c", _FOUND + script, str(settings.findings)]

    return Part(name, "nothing", limit_s, command)


GOOD = part("good", "found.figure('speed', 2.0, 'GB/s', at_least=1.0); found.finish()")
MISSED = part("missed", "found.figure('speed', 0.5, 'GB/s', at_least=1.0); found.finish()")
NOTHING_TO_CHECK = part("skipped", "found.skip('no such card'); found.finish()")


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """What the command changes of its process stays with these tests."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)
    runner.adopt_orphans(False)


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, Any, str]]:
    """Exit status, JSON and what was printed of a rehearsal of these parts."""

    def run_parts(*parts: Part, only: tuple[str, ...] = ()) -> tuple[int, Any, str]:
        path = tmp_path / "result.json"
        argv = [
            "--rehearse",
            "--limit-factor",
            "1",
            "--json",
            str(path),
            *(["--only", *only] if only else []),
        ]
        status = check.main(argv, parts)
        return status, json.loads(path.read_text()), capsys.readouterr().out

    return run_parts


def children() -> set[int]:
    return {process.pid for process in psutil.Process().children(recursive=True)}


def test_passes_and_says_what_it_found(run: Callable[..., tuple[int, Any, str]]) -> None:
    status, result, printed = run(GOOD, NOTHING_TO_CHECK)
    assert status == 0
    assert result["passed"] is True
    assert result["rehearsal"] is True
    assert result["not_run"] == []
    assert [part["status"] for part in result["parts"]] == ["pass", "skip"]
    (figure,) = result["parts"][0]["figures"]
    assert figure == {
        "name": "speed", "value": 2.0, "unit": "GB/s", "at_least": 1.0, "target": ">= 1",
        "met": True,
    }  # fmt: skip
    assert result["versions"]["pytest"] == pytest.__version__
    assert "speed 2 GB/s (>= 1: met)" in printed
    assert "skipped: no such card" in printed
    assert "1 passed, 0 failed, 1 skipped" in printed


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (MISSED, "speed 0.5 GB/s (>= 1: MISSED)"),
        (part("x", "found.fail('wrong tokens'); found.finish()"), "wrong tokens"),
        (part("x", "found.figure('a', 1.0); found.finish(); sys.exit(3)"), "ended with status 3"),
        (part("x", "found.figure('a', 1.0)"), "ended before it was done"),
        (part("x", "found.finish()"), "it found nothing"),
        (part("x", "os.remove(sys.argv[1])"), "it left no findings"),
        (part("x", "found.figure('a', float('nan'), at_least=1.0); found.finish()"), "MISSED"),
    ],
)
def test_what_fails(run: Callable[..., tuple[int, Any, str]], bad: Part, reason: str) -> None:
    status, result, printed = run(bad, GOOD)
    assert status == 1
    assert result["passed"] is False
    assert [part["status"] for part in result["parts"]] == ["fail", "pass"]  # the others still ran
    assert reason in result["parts"][0]["reason"]
    assert reason in printed


def test_a_part_is_killed_at_its_limit_with_all_it_started(
    run: Callable[..., tuple[int, Any, str]],
) -> None:
    child = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"
    script = (
        "found.figure('first', 1.0)\n"
        f"subprocess.Popen([sys.executable, '-c', {child!r}], start_new_session=True)\n"
        "time.sleep(600)"
    )
    before, started_s = children(), time.monotonic()
    status, result, _ = run(part("slow", script, limit_s=1.5), GOOD)
    assert status == 1
    slow = result["parts"][0]
    assert "killed at its limit" in slow["reason"]
    assert [figure["name"] for figure in slow["figures"]] == ["first"]  # what it had is kept
    assert time.monotonic() - started_s < 60
    assert result["parts"][1]["status"] == "pass"
    assert children() == before


def test_a_part_at_its_limit_is_asked_first(run: Callable[..., tuple[int, Any, str]]) -> None:
    """So that its systems can stop their processes."""
    script = (
        "import signal\n"
        "def stop(*_): found.figure('stopped', 1.0); sys.exit(1)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        "time.sleep(600)"
    )
    _, result, _ = run(part("slow", script, limit_s=2.0))
    assert [figure["name"] for figure in result["parts"][0]["figures"]] == ["stopped"]


def test_a_part_may_leave_no_process(
    run: Callable[..., tuple[int, Any, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "SETTLE_S", 0.2)
    script = (
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'],"
        " start_new_session=True, stdout=subprocess.DEVNULL)\n"
        "found.figure('a', 1.0); found.finish()"
    )
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as bystander:
        before = children()
        status, result, _ = run(part("leaver", script))
        assert status == 1
        assert "left behind process" in result["parts"][0]["reason"]
        assert children() == before, "what was there before is not the part's"
        bystander.kill()


def test_one_part_alone(run: Callable[..., tuple[int, Any, str]]) -> None:
    status, result, _ = run(MISSED, GOOD, only=("good",))
    assert status == 0
    assert [part["name"] for part in result["parts"]] == ["good"]


def test_an_interrupted_check_keeps_what_it_has(
    run: Callable[..., tuple[int, Any, str]], tmp_path: Path
) -> None:
    mark = tmp_path / "there"
    script = f"found.figure('first', 1.0); Path({str(mark)!r}).touch(); time.sleep(600)"

    def interrupt() -> None:
        while not mark.exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    status, result, _ = run(GOOD, part("slow", script), MISSED)
    assert status == 1
    assert [part["status"] for part in result["parts"]] == ["pass", "fail"]
    assert result["parts"][1]["reason"] == "interrupted"
    assert [figure["name"] for figure in result["parts"][1]["figures"]] == ["first"]
    assert result["not_run"] == ["missed"]
    assert result["passed"] is False


def test_without_a_gpu_nothing_passes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "describe_gpu", lambda gpu: None)
    monkeypatch.setattr(machine, "GPU_MODULES", {})
    assert check.main([], [GOOD]) == 2
    assert "nothing was checked" in capsys.readouterr().err


def test_missing_packages_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "MODULES", {"no_such_module": "the-package"})
    assert check.main(["--rehearse"], [GOOD]) == 2
    assert "the-package" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("after", "status"), [([100.0], "pass"), ([300.0, 120.0], "pass"), ([300.0], "fail")]
)
def test_gpu_memory_held_fails_a_part(
    after: list[float], status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "FREED_WITHIN_S", 0.3)
    found = Findings(figures=[Figure("a", 1.0)], done=True)
    outcome = runner.judge("x", found, 0, "", 1.0)
    used = iter(after)
    last = after[-1]
    assert check.check_held(outcome, 100.0, lambda: next(used, last)).status == status


@pytest.mark.parametrize("value", [math.nan, math.inf, "fast"])
def test_what_is_no_number_meets_no_target(value: float | str) -> None:
    assert Figure("x", value, at_least=0.0).met is False
    assert Figure("x", value, at_most=1.0).met is False
    assert Figure("x", value).met is None


def test_findings_survive_the_file(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    writer = gpu_findings.FindingsWriter(path)
    writer.figure("ratio", 0.9, at_least=0.8, at_most=1.5, note="of medians")
    writer.figure("way", "ipc")
    writer.skip("one card")
    assert gpu_findings.read(path) == writer.findings  # without `finish`, too
    assert writer.finish() is True
    assert gpu_findings.read(path).done is True


def test_all_parts_together_end_in_time(
    run: Callable[..., tuple[int, Any, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert TOTAL_LIMIT_S < 600
    assert all(part.limit_s < TOTAL_LIMIT_S for part in PARTS)
    monkeypatch.setattr(check, "TOTAL_LIMIT_S", 2.0)
    started_s = time.monotonic()
    _, result, _ = run(*(part(name, "time.sleep(600)") for name in ("one", "two")))
    assert [part["status"] for part in result["parts"]] == ["fail", "fail"]
    assert "killed at its limit of 1 s" in result["parts"][1]["reason"]
    assert time.monotonic() - started_s < 60


def test_the_page_about_it_knows_every_part() -> None:
    page = (check.RESULTS / "gpu-check.md").read_text()
    rows = [f"| `{part.name}` | {part.limit_s:.0f} s |" for part in PARTS]
    assert [row for row in rows if row not in page] == []


def test_every_part_is_there(tmp_path: Path) -> None:
    """Files that the commands name exist."""
    for one in PARTS:
        command = one.command(Settings(tmp_path / "f.json", 1.0, rehearse=True))
        files = [word for word in command if word.endswith(".py")]
        assert files
        assert [name for name in files if not (ROOT / name).is_file()] == []


_TESTS = """
import pytest

def test_good(record_property):
    record_property("figure", {"name": "error", "value": 0.5, "at_most": 1.0})

def test_bad():
    assert 1 == 2

@pytest.mark.skip(reason="one card only")
def test_skipped():
    pass
"""


def test_tests_are_findings(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(_TESTS)
    path = tmp_path / "found.json"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "gpu_check.pytest_findings",
               "--findings", str(path), "-p", "no:cacheprovider", "test_some.py"]  # fmt: skip
    environment = machine.child_environment(ROOT, "0", os.environ)
    subprocess.run(
        command, check=False, cwd=tmp_path, env=environment, capture_output=True, timeout=60
    )
    found = gpu_findings.read(path)
    assert found.done
    assert [(figure.name, figure.value) for figure in found.figures] == [
        ("error", 0.5),
        ("tests passed", 1.0),
    ]
    assert found.failures == ["test_some.py::test_bad: assert 1 == 2"]
    assert found.skips == ["test_some.py::test_skipped: one card only"]
