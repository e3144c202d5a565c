"""The helpers that other tests lean on."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipemax.proto.process import EXIT_FATAL, error_file
from pipemax.proto.rundir import create_run_dir
from support.forkserver import log_of, running, start_process, stop_process
from support.promtool import REQUIRE_VARIABLE, check_metrics

_DEADLINE_S = 60.0


def _wait_for(path: Path) -> str:
    deadline = time.monotonic() + _DEADLINE_S
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.01)
    return path.read_text()


def test_a_forked_process_is_what_its_command_line_would_be(runtime_dir: Path) -> None:
    run_dir = create_run_dir("a")
    process = start_process("stage-1", "support.bodies:report", run_dir, index=1)
    process.join(_DEADLINE_S)
    assert stop_process(process) == 0
    assert (run_dir / "report").read_text() == f"pm-stage-1 1 {runtime_dir}"


def test_its_output_goes_to_its_log() -> None:
    run_dir = create_run_dir("a")
    process = start_process("coordinator", "support.bodies:refuse", run_dir)
    process.join(_DEADLINE_S)
    assert stop_process(process) == EXIT_FATAL
    assert error_file(run_dir, "coordinator").read_text() == "cannot work like this\n"
    assert "coordinator ERROR cannot work like this" in log_of(run_dir, "coordinator")


def test_it_is_stopped_at_the_end_of_the_block() -> None:
    run_dir = create_run_dir("a")
    with running("kv-daemon", "support.bodies:wait", run_dir) as process:
        assert int(_wait_for(run_dir / "pid")) == process.pid
    with pytest.raises(ProcessLookupError):
        os.kill(int((run_dir / "pid").read_text()), 0)


_DYING_TEST = """
import os, sys, time
from pathlib import Path
from support.forkserver import CONTEXT, start_process

if __name__ == "__main__":
    CONTEXT.set_forkserver_preload([])  # of the server nothing is to be seen but that it ends
    run_dir = Path(sys.argv[1])
    process = start_process("stage-0", "support.bodies:wait", run_dir)
    while not (run_dir / "pid").exists():
        time.sleep(0.01)
    os.kill(os.getpid(), 9)
"""


def test_it_leaves_when_the_tests_are_killed() -> None:
    run_dir = create_run_dir("a")
    subprocess.run(
        [sys.executable, "-c", _DYING_TEST, run_dir],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        check=False,
    )
    pid = int((run_dir / "pid").read_text())
    deadline = time.monotonic() + _DEADLINE_S
    while _lives(pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _lives(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


_GOOD = "# HELP pipemax_requests Requests.\n# TYPE pipemax_requests gauge\npipemax_requests 1\n"


def test_metrics_are_checked() -> None:
    check_metrics(_GOOD)
    for bad in ("not metrics at all", _GOOD.replace("gauge", "counter")):
        with pytest.raises(AssertionError):
            check_metrics(bad)


def test_without_promtool_a_check_is_skipped_or_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv(REQUIRE_VARIABLE, raising=False)
    with pytest.raises(pytest.skip.Exception, match="Debian package"):
        check_metrics(_GOOD)
    monkeypatch.setenv(REQUIRE_VARIABLE, "1")
    with pytest.raises(pytest.fail.Exception, match="promtool is not installed"):
        check_metrics(_GOOD)
