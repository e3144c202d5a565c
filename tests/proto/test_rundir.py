import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from pipemax.proto.errors import AlreadyRunningError, ConfigError
from pipemax.proto.rundir import (
    LOCK_FILE,
    LOG_DIR,
    RunLock,
    create_run_dir,
    launcher_pid,
    run_dir_of,
    runtime_root,
    socket_endpoint,
)

_HOLDER = """
import sys
from pathlib import Path
from pipemax.proto.rundir import RunLock

lock = RunLock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def test_it_is_private(runtime_dir: Path) -> None:
    path = create_run_dir("a")
    assert path == runtime_dir / "a" == run_dir_of("a")
    for folder in (path, path / LOG_DIR):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert create_run_dir("a") == path, "a second start uses the same folder"


@pytest.mark.parametrize("name", ["", "..", "../a", "/tmp", "a/b", "a" * 41, "a\n"])
def test_a_name_is_no_path(name: str) -> None:
    with pytest.raises(ConfigError, match="--name"):
        run_dir_of(name)


def test_where_it_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert runtime_root() == Path(os.environ["PIPEMAX_RUNTIME_DIR"])
    monkeypatch.delenv("PIPEMAX_RUNTIME_DIR")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert runtime_root() == tmp_path / "pipemax"
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "missing"))
    assert runtime_root().name == f"pipemax-{os.getuid()}"


def test_a_folder_open_to_others_is_refused(runtime_dir: Path) -> None:
    create_run_dir("a").chmod(0o750)
    with pytest.raises(ConfigError, match=r"open to other users \(mode 750\)"):
        create_run_dir("a")


def test_a_link_is_refused(runtime_dir: Path, tmp_path: Path) -> None:
    """Someone else may have put it there."""
    tmp_path.chmod(0o700)
    (runtime_dir / "a").symlink_to(tmp_path)
    with pytest.raises(ConfigError, match="not a directory of ours"):
        create_run_dir("a")


def test_a_file_in_its_place_is_refused(runtime_dir: Path) -> None:
    (runtime_dir / "a").write_text("")
    with pytest.raises(ConfigError, match="set PIPEMAX_RUNTIME_DIR to a writable folder"):
        create_run_dir("a")


def test_a_path_too_long_for_sockets_is_refused_and_not_made(
    monkeypatch: pytest.MonkeyPatch, runtime_dir: Path
) -> None:
    long = runtime_dir / ("x" * 100)
    monkeypatch.setenv("PIPEMAX_RUNTIME_DIR", str(long))
    with pytest.raises(ConfigError, match="too long for Unix sockets"):
        create_run_dir("a")
    assert not long.exists()


def test_the_longest_path_that_is_accepted_can_be_bound(
    monkeypatch: pytest.MonkeyPatch, runtime_dir: Path
) -> None:
    import socket

    room = 107 - len(os.fsencode(runtime_dir / "a" / "control.sock"))
    run_dir = create_run_dir("a" * (room + 1))
    path = socket_endpoint(run_dir, "control").removeprefix("ipc://")
    assert len(path) == 107
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(path)
    with pytest.raises(ConfigError, match="too long"):
        create_run_dir("a" * (room + 2))


def test_one_launcher_at_a_time() -> None:
    run_dir = create_run_dir("a")
    assert launcher_pid(run_dir) is None
    lock = RunLock(run_dir)
    assert launcher_pid(run_dir) == os.getpid()
    with pytest.raises(AlreadyRunningError, match=f"named 'a' is already running.*{os.getpid()}"):
        RunLock(run_dir)
    lock.release()
    lock.release()
    assert launcher_pid(run_dir) is None
    RunLock(run_dir).release()


def test_the_lock_goes_with_its_process() -> None:
    run_dir = create_run_dir("a")
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(run_dir)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert launcher_pid(run_dir) == holder.pid
        with pytest.raises(AlreadyRunningError, match=str(holder.pid)):
            RunLock(run_dir)
        holder.kill()
        holder.wait()
    assert (run_dir / LOCK_FILE).read_text() == f"{holder.pid}\n", "it had no time to clean up"
    assert launcher_pid(run_dir) is None
    RunLock(run_dir).release()


def test_asking_is_not_taken_for_a_launcher(runtime_dir: Path) -> None:
    """`status` takes the lock for an instant: neither a second `status` nor an `up` may see a
    launcher in it, whatever pid a dead one left in the file."""
    import fcntl
    import threading

    run_dir = create_run_dir("a")
    (run_dir / LOCK_FILE).write_text("1\n")
    with (run_dir / LOCK_FILE).open("r+") as asking:
        fcntl.flock(asking, fcntl.LOCK_SH)
        assert launcher_pid(run_dir) is None
        threading.Timer(0.05, lambda: fcntl.flock(asking, fcntl.LOCK_UN)).start()
        RunLock(run_dir).release()


def test_the_probe_leaves_a_missing_folder_alone(runtime_dir: Path) -> None:
    assert launcher_pid(runtime_dir / "nothing") is None
    assert not (runtime_dir / "nothing").exists()
