"""A system for one command: stopped whatever ends the command, and its failure is the error."""

import functools
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipemax.proto.errors import ConfigError, NotRunningError, ProcessFailedError
from pipemax.services import own_system as module
from pipemax.services.launcher.supervisor import Phase
from pipemax.services.launcher.system import System
from pipemax.services.own_system import own_system
from support.fake_system import fake_config, fakes

Install = Callable[..., None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Gives own_system fake processes with these behaviours."""

    def install(**behaviours: str) -> None:
        fake = functools.partial(System, processes=fakes(**behaviours))
        monkeypatch.setattr(module, "System", fake)

    return install


def test_stops_at_the_end_of_the_block_and_leaves_nothing(
    install: Install, runtime_dir: Path
) -> None:
    install()
    with own_system(fake_config(), ready_timeout_s=60, temporary=True) as system:
        assert system.metrics_port == 4711
    assert list(runtime_dir.iterdir()) == []


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
def test_a_signal_unwinds_the_command(
    install: Install, signum: signal.Signals, runtime_dir: Path
) -> None:
    install()
    before = signal.getsignal(signum)
    with (
        pytest.raises(SystemExit) as raised,
        own_system(fake_config(), ready_timeout_s=60, temporary=True),
    ):
        signal.raise_signal(signum)
    assert raised.value.code == 128 + signum
    assert signal.getsignal(signum) is before
    assert list(runtime_dir.iterdir()) == []


def test_a_signal_while_stopping_does_not_wait_and_leaves_nothing(
    install: Install, runtime_dir: Path
) -> None:
    install(stage_1="stubborn")
    started: list[int] = []
    main_thread = threading.main_thread().ident
    impatient = threading.Timer(0.3, signal.pthread_kill, (main_thread, signal.SIGTERM))

    def work(system: System) -> None:
        started.extend(system.pids().values())
        impatient.start()

    with (
        pytest.raises(SystemExit) as raised,
        own_system(fake_config(), ready_timeout_s=60, temporary=True) as system,
    ):
        work(system)
    impatient.join()
    assert raised.value.code == 128 + signal.SIGTERM
    assert not [pid for pid in started if Path(f"/proc/{pid}").exists()]
    assert list(runtime_dir.iterdir()) == []


def test_what_a_client_meets_when_the_system_breaks_is_not_the_cause(install: Install) -> None:
    def lose_the_coordinator(system: System) -> None:
        """While draining, when it is not started again."""
        system.request_stop(drain=True)
        while system.phase is not Phase.DRAINING:
            time.sleep(0.01)
        os.kill(system.pids()["coordinator"], signal.SIGKILL)
        with pytest.raises(ProcessFailedError):
            system.wait()
        raise NotRunningError("it has ended")

    install(coordinator="never-drained")
    with (
        pytest.raises(ProcessFailedError, match="coordinator was killed by SIGKILL"),
        own_system(fake_config(), ready_timeout_s=60, temporary=False) as system,
    ):
        lose_the_coordinator(system)


def test_errors_of_the_command_itself_pass_through(install: Install, runtime_dir: Path) -> None:
    install()
    with (
        pytest.raises(NotRunningError, match="another system"),
        own_system(fake_config(), ready_timeout_s=60, temporary=True),
    ):
        raise NotRunningError("another system")
    assert list(runtime_dir.iterdir()) == []


def test_a_system_that_cannot_work_never_enters_the_block(
    install: Install, runtime_dir: Path
) -> None:
    install(stage_1="fatal")
    with (
        pytest.raises(ConfigError, match="teapot"),
        own_system(fake_config(), ready_timeout_s=60, temporary=True),
    ):
        pytest.fail("entered the block")
    assert list(runtime_dir.iterdir()) == []
