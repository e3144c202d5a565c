"""How a process starts, says why it cannot, and leaves."""

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from pipemax.proto.process import EXIT_FATAL, EXIT_LAUNCHER_GONE, error_file

_WAIT_S = 60

_BODIES = """
import os, signal, sys, time
from pathlib import Path
from pipemax.proto.errors import ModelError
from pipemax.proto.process import on_stop_signals, process_main

def refuses(run_dir, index):
    raise ModelError("model folder /m\\nhas no weights")

def crashes(run_dir, index):
    raise ValueError("a bug")

def returns(run_dir, index):
    name = Path("/proc/self/comm").read_text().strip()
    print(name, run_dir, index, flush=True)

def waits(run_dir, index):
    print(os.getpid(), flush=True)
    time.sleep(600)

def stops(run_dir, index):
    stopped = []
    on_stop_signals(lambda: stopped.append(1))
    os.kill(os.getpid(), signal.SIGINT)
    print("ready", flush=True)
    while not stopped:
        time.sleep(0.01)
    print("stopped", flush=True)

sys.exit(process_main("stage", globals()[sys.argv[1]], sys.argv[2:]))
"""


@contextmanager
def _started(
    body: str, run_dir: Path, *options: str, pass_fds: tuple[int, ...] = ()
) -> Iterator["subprocess.Popen[str]"]:
    process = subprocess.Popen(
        [sys.executable, "-c", _BODIES, body, "--run-dir", str(run_dir), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        pass_fds=pass_fds,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def _run(body: str, run_dir: Path, *options: str) -> tuple[int, str, str]:
    with _started(body, run_dir, *options) as process:
        out, err = process.communicate(timeout=_WAIT_S)
        return process.returncode, out, err


def test_it_has_its_name_and_arguments(runtime_dir: Path) -> None:
    status, out, _ = _run("returns", runtime_dir, "--index", "3")
    assert (status, out) == (0, f"pm-stage-3 {runtime_dir} 3\n")
    status, out, _ = _run("returns", runtime_dir)
    assert (status, out) == (0, f"pm-stage {runtime_dir} 0\n")


def test_an_error_for_the_user_is_one_line_in_a_file(runtime_dir: Path) -> None:
    status, _, err = _run("refuses", runtime_dir, "--index", "1")
    assert status == EXIT_FATAL
    file = error_file(runtime_dir, "stage-1")
    assert file.read_text() == "model folder /m has no weights\n"
    assert "stage-1 ERROR model folder /m" in err
    assert "Traceback" not in err
    assert _run("returns", runtime_dir, "--index", "1")[0] == 0
    assert not file.exists(), "an old reason must not be taken for a new one"


def test_a_bug_leaves_its_traceback_in_the_log_and_no_reason(runtime_dir: Path) -> None:
    status, _, err = _run("crashes", runtime_dir)
    assert status == 1
    assert "ValueError: a bug" in err
    assert not error_file(runtime_dir, "stage").exists()


def test_a_bad_log_level_is_named(runtime_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPEMAX_LOG_LEVEL", "LOUD")
    assert _run("returns", runtime_dir)[0] == EXIT_FATAL
    assert "PIPEMAX_LOG_LEVEL='LOUD'" in error_file(runtime_dir, "stage").read_text()


def test_a_missing_run_directory_is_still_one_line(runtime_dir: Path) -> None:
    status, _, err = _run("refuses", runtime_dir / "missing")
    assert status == EXIT_FATAL
    assert "has no weights" in err
    assert "Traceback" not in err


def test_it_leaves_when_the_launcher_closes_the_pipe(runtime_dir: Path) -> None:
    """The write end closes when the launcher dies, however it dies."""
    read_end, write_end = os.pipe()
    try:
        fd = str(read_end)
        with _started(
            "waits", runtime_dir, "--parent-pipe-fd", fd, pass_fds=(read_end,)
        ) as process:
            assert process.stdout is not None
            process.stdout.readline()
            os.close(write_end)
            assert process.wait(_WAIT_S) == EXIT_LAUNCHER_GONE
    finally:
        os.close(read_end)
        with suppress(OSError):
            os.close(write_end)


_LAUNCHER = """
import os, subprocess, sys, time

read_end, write_end = os.pipe()
command = [sys.executable, "-c", sys.argv[1], "waits", "--run-dir", sys.argv[2]]
command += ["--parent-pipe-fd", str(read_end)]
subprocess.Popen(command, pass_fds=(read_end,))
time.sleep(600)
"""


def test_it_leaves_when_the_launcher_is_killed(runtime_dir: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _LAUNCHER, _BODIES, str(runtime_dir)],
        stdout=subprocess.PIPE,
        text=True,
    ) as launcher:
        assert launcher.stdout is not None
        pid = int(launcher.stdout.readline())
        pidfd = os.pidfd_open(pid)
        launcher.kill()
    ended, _, _ = select.select([pidfd], [], [], _WAIT_S)
    os.close(pidfd)
    assert ended


def test_sigterm_asks_it_to_stop_and_sigint_is_ignored(runtime_dir: Path) -> None:
    with _started("stops", runtime_dir) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "stopped\n"
        assert process.wait(_WAIT_S) == 0
