"""Every test gets a run directory of its own and may leave nothing behind."""

import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from support.leaks import (
    RUNTIME_DIR_VARIABLE,
    kill_leaked_processes,
    settled_leaks,
    snapshot,
)

# How long an example takes says something about the machine, not about the code.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


# Background jobs of a shell ignore some signals, and so would all that is started here; tests send
# them.
for _signum in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
    if signal.getsignal(_signum) is signal.SIG_IGN:
        signal.signal(
            _signum, signal.default_int_handler if _signum is signal.SIGINT else signal.SIG_DFL
        )


@pytest.fixture(scope="session", autouse=True)
def _nothing_outlives_the_session() -> Iterator[None]:
    """Catches what fixtures of modules and of the session leave."""
    before = snapshot()
    yield
    found = settled_leaks(before)
    kill_leaked_processes(before)
    if found:
        pytest.fail("the test session left behind:\n  " + "\n  ".join(found))


@pytest.fixture(autouse=True)
def runtime_dir(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """`$PIPEMAX_RUNTIME_DIR` for this test, with `$PIPEMAX_STATE_DIR` in it: private, and short
    enough for Unix sockets."""
    path = Path(tempfile.mkdtemp(prefix="pm", dir="/tmp"))
    monkeypatch.setenv(RUNTIME_DIR_VARIABLE, str(path))
    monkeypatch.setenv("PIPEMAX_STATE_DIR", str(path / "state"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(autouse=True)
def _nothing_left_behind(runtime_dir: Path) -> Iterator[None]:
    """Runs around all other fixtures of the test but `runtime_dir`."""
    before = snapshot(fresh=True)
    yield
    found = settled_leaks(before)
    kill_leaked_processes(before)
    if found:
        pytest.fail("this test left behind:\n  " + "\n  ".join(found))
