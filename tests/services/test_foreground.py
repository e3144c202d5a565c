"""`pipemax up` as a process of its own, over fake processes: signals, and a killed launcher."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from pipemax.proto.rundir import RunLock, launcher_pid

FAKE_LAUNCHER = Path(__file__).with_name("fake_launcher.py")
PATIENCE_S = 60.0


@contextmanager
def launcher(behaviour: str = "live") -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, str(FAKE_LAUNCHER), behaviour],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("fore is ready: none, 2 stages")
        yield process
    finally:
        process.kill()
        process.communicate()


def eventually(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"never happened: {what}"
        time.sleep(0.01)


def alive(process: psutil.Process) -> bool:
    """False for a zombie too: init may take its time to reap what a killed launcher left."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_drains_and_stops(signum: signal.Signals, runtime_dir: Path) -> None:
    with launcher() as process:
        process.send_signal(signum)
        _, errors = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0, errors
    assert errors.splitlines()[-1] == "fore stopped"
    assert (runtime_dir / "fore" / "logs" / "drained").exists()


def test_ctrl_c_reaches_only_the_launcher() -> None:
    with launcher() as process:
        children = psutil.Process(process.pid).children()
        assert len(children) == 4
        for child in children:
            assert os.getsid(child.pid) == child.pid


def test_second_signal_does_not_wait_for_what_is_left(runtime_dir: Path) -> None:
    with launcher("never-drained") as process:
        process.send_signal(signal.SIGINT)
        eventually((runtime_dir / "fore" / "logs" / "drained").exists, "drain asked for")
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0, errors


def test_sigquit_does_not_drain(runtime_dir: Path) -> None:
    with launcher("never-drained") as process:
        process.send_signal(signal.SIGQUIT)
        _, errors = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0, errors
    assert not (runtime_dir / "fore" / "logs" / "drained").exists()


def test_waiting_for_the_last_requests_says_how_many() -> None:
    with launcher("never-drained") as process:
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        lines = iter(process.stderr.readline, "")
        assert any(line.startswith("finishing 7 accepted requests") for line in lines)


def test_killed_launcher_leaves_no_process_and_nothing_in_the_way(runtime_dir: Path) -> None:
    with launcher() as process:
        children = psutil.Process(process.pid).children()
        assert len(children) == 4
        process.kill()
        process.wait()
        eventually(lambda: not any(map(alive, children)), "children left")
    assert launcher_pid(runtime_dir / "fore") is None
    RunLock(runtime_dir / "fore").release()
    with launcher() as process:  # over the sockets that the first one left
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 0
    assert not list((runtime_dir / "fore").glob("*.sock"))
