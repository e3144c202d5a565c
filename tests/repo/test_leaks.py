"""The leak check finds what it is for. Each test leaks on purpose, looks, and cleans up."""

import mmap
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import zmq

from pipemax.proto.memory import SharedMemory
from pipemax.proto.rundir import RunLock, create_run_dir
from support import leaks
from support.forkserver import CONTEXT

_NOW = 0.0


def _leak_of(make: Callable[[], object]) -> tuple[object, list[str]]:
    before = leaks.snapshot()
    held = make()
    return held, leaks.settled_leaks(before, settle_s=_NOW)


def test_nothing_is_nothing() -> None:
    assert _leak_of(lambda: None) == (None, [])


def test_processes_of_processes() -> None:
    before = leaks.snapshot()
    shell = subprocess.Popen(
        ["/bin/sh", "-c", "sleep 600 & echo started; wait"], stdout=subprocess.PIPE, text=True
    )
    with shell:
        assert shell.stdout is not None
        shell.stdout.readline()
        found = leaks.settled_leaks(before, settle_s=_NOW)
        leaks.kill_leaked_processes(before)
        shell.wait()
    assert [line for line in found if line.startswith("process") and "sleep 600" in line]
    assert leaks.settled_leaks(before) == []


def test_processes_without_parent(runtime_dir: Path) -> None:
    """A launcher that is killed must not leave stages behind, wherever they hang in the tree."""
    before = leaks.snapshot()
    pid = int(subprocess.check_output(["/bin/sh", "-c", "sleep 601 >/dev/null 2>&1 & echo $!"]))
    found = leaks.settled_leaks(before, settle_s=_NOW)
    assert any(line.startswith(f"process {pid}:") for line in found)
    leaks.kill_leaked_processes(before)
    assert leaks.settled_leaks(before) == []


def test_forked_processes_but_not_the_forkserver() -> None:
    before = leaks.snapshot()
    process = CONTEXT.Process(target=_sleep)
    process.start()
    found = leaks.settled_leaks(before, settle_s=_NOW)
    process.kill()
    process.join()
    process.close()
    assert any(line.startswith("process") for line in found)
    assert leaks.settled_leaks(before) == [], "the forkserver itself is no leak"


def _sleep() -> None:
    import time

    time.sleep(600)


def test_threads() -> None:
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait, name="lingering")
    _, found = _leak_of(thread.start)
    stop.set()
    thread.join()
    assert found == ["thread lingering"]


def test_file_descriptors(tmp_path: Path) -> None:
    fd, found = _leak_of(lambda: os.open(tmp_path, os.O_RDONLY))
    assert isinstance(fd, int)
    os.close(fd)
    assert found == [f"file descriptor {fd}: {tmp_path}"]


def test_sockets() -> None:
    before = leaks.snapshot()
    with zmq.Context() as context, context.socket(zmq.DEALER):
        assert leaks.settled_leaks(before, settle_s=_NOW)
    assert leaks.settled_leaks(before) == []


def test_shared_memory() -> None:
    memory, found = _leak_of(lambda: SharedMemory.create("leaked", 4096))
    assert isinstance(memory, SharedMemory)
    memory.close()
    assert any(line.startswith("file descriptor") and "memfd:leaked" in line for line in found)
    assert any(line.startswith("mapped memory /memfd:leaked") for line in found)


def test_mapped_memory_without_a_descriptor() -> None:
    fd = os.memfd_create("mapped")
    os.ftruncate(fd, 4096)
    before = leaks.snapshot()
    mapped = mmap.mmap(fd, 4096)
    os.close(fd)
    found = leaks.settled_leaks(before, settle_s=_NOW)
    mapped.close()
    assert any(line.startswith("mapped memory /memfd:mapped") for line in found)


def test_named_shared_memory() -> None:
    path = Path("/dev/shm") / f"pipemax-test-{os.getpid()}"
    _, found = _leak_of(path.touch)
    path.unlink()
    assert found == [str(path)]


_MAPS = """
import mmap, os, sys, time
first = sys.argv[1] + "-first"  # as the C library makes a named semaphore
with open(first, "wb+") as file:
    file.truncate(4096)
    mapped = mmap.mmap(file.fileno(), 4096)
    os.link(first, sys.argv[1])
    os.unlink(first)
print("mapped", flush=True)
time.sleep(600)
"""


def test_shared_memory_of_other_programs_is_no_leak() -> None:
    path = Path("/dev/shm") / f"pipemax-test-{os.getpid()}"
    # No descendant of ours, and nothing in its environment says where it comes from.
    script = 'env -i "$0" -c "$1" "$2" & echo $!'
    words = ["/bin/sh", "-c", script, sys.executable, _MAPS, str(path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as shell:
        assert shell.stdout is not None
        pid = int(shell.stdout.readline())
        try:
            assert shell.stdout.readline() == "mapped\n"
            assert path.name not in leaks.our_shm_files()
        finally:
            os.kill(pid, 9)
            path.unlink()


def test_locked_run_directories() -> None:
    lock, found = _leak_of(lambda: RunLock(create_run_dir("left")))
    lock.release()  # type: ignore[attr-defined]
    assert any(line.startswith("locked run directory") for line in found)


_LEAKING_SUITE = """
import os, subprocess

def test_clean():
    pass

def test_process():
    subprocess.Popen(["sleep", "602"]).returncode = 0  # or Popen itself would warn

def test_descriptor():
    os.open(__file__, os.O_RDONLY)

def test_after():
    pass
"""


def test_a_leaking_test_fails_and_only_that_one(tmp_path: Path) -> None:
    """The whole way, through conftest.py."""
    tests = Path(__file__).parents[1]
    patient = (tests / "conftest.py").read_text()
    impatient = patient.replace("settled_leaks(before)", "settled_leaks(before, settle_s=0.2)")
    assert impatient != patient
    (tmp_path / "conftest.py").write_text(impatient)
    (tmp_path / "test_leaking.py").write_text(_LEAKING_SUITE)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", "."],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
        env=os.environ | {"PYTHONPATH": str(tests)},
    )
    assert "ERROR test_leaking.py::test_process" in done.stdout
    assert "sleep 602" in done.stdout
    assert "ERROR test_leaking.py::test_descriptor" in done.stdout
    assert "4 passed" in done.stdout
    # The leaking tests and, for what cannot be taken back, the session.
    assert "3 errors" in done.stdout


@pytest.mark.parametrize("kept", ["/dev/urandom", "/dev/null"])
def test_what_libraries_keep_open_is_no_leak(kept: str) -> None:
    fd, found = _leak_of(lambda: os.open(kept, os.O_RDONLY))
    assert isinstance(fd, int)
    os.close(fd)
    assert found == []
