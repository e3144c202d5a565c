"""The launcher with fake processes: deaths, restarts, stops, and what is left behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec.structs import replace

from pipemax.proto.config import EngineConfig, load_config
from pipemax.proto.errors import AlreadyRunningError, ConfigError, ProcessFailedError
from pipemax.proto.rundir import RunLock, launcher_pid, run_dir_of
from pipemax.services.launcher import rundir_files
from pipemax.services.launcher.processes import ProcessSpec
from pipemax.services.launcher.supervisor import Phase, Policy
from pipemax.services.launcher.system import System
from support.fake_system import fake_config, fakes

PATIENCE_S = 60.0


def eventually(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"never happened: {what}"
        time.sleep(0.01)


def assert_nothing_left(name: str, pids: dict[str, int]) -> None:
    assert not [process for process, pid in pids.items() if Path(f"/proc/{pid}").exists()]
    run_dir = run_dir_of(name)
    assert {path.name for path in run_dir.iterdir()} == {"lock", "logs"}
    RunLock(run_dir).release()


def test_starts_writes_the_configuration_and_stops_after_draining() -> None:
    with System(fake_config(), processes=fakes()) as system:
        assert system.wait_ready()
        assert system.metrics_port == 4711
        assert load_config(system.run_dir) == system.config
        pids = system.pids()
        assert set(pids) == {"coordinator", "kv-daemon", "stage-0", "stage-1"}
        assert launcher_pid(system.run_dir) == os.getpid()
        system.stop(drain=True)
    assert (system.run_dir / "logs" / "drained").exists()
    assert system.phase is Phase.STOPPED
    assert not system.failed
    assert_nothing_left("t", pids)


def test_leaving_the_block_stops_without_draining() -> None:
    with System(fake_config(), processes=fakes()) as system:
        system.wait_ready()
        pids = system.pids()
    assert not (system.run_dir / "logs" / "drained").exists()
    assert_nothing_left("t", pids)


def test_killed_stage_is_restarted() -> None:
    notices: list[str] = []
    with System(
        fake_config(),
        processes=fakes(),
        on_notice=notices.append,
        policy=Policy(backoff_first_s=0.01),
    ) as system:
        system.wait_ready()
        before = system.pids()
        os.kill(before["stage-1"], signal.SIGKILL)
        eventually(lambda: "ready again" in notices, "recovery")
        after = system.pids()
        assert after.pop("stage-1") != before.pop("stage-1")
        assert after == before
        assert notices[0].startswith("stage-1 was killed by SIGKILL; starting it again")


def test_flapping_stage_ends_everything() -> None:
    policy = Policy(backoff_first_s=0.01, flapping_deaths=2)
    with System(fake_config(), processes=fakes(stage_1="crash-later"), policy=policy) as system:
        system.wait_ready()
        pids = system.pids()
        (system.run_dir / "logs" / "crash").touch()
        with pytest.raises(ProcessFailedError, match=r"stage-1 .*3 deaths in 60 s, giving up"):
            system.wait()
    assert system.failed
    assert_nothing_left("t", pids)


def test_fatal_process_gives_its_reason_on_one_line() -> None:
    with System(fake_config(), processes=fakes(stage_0="fatal")) as system:
        with pytest.raises(ConfigError) as raised:
            system.wait_ready()
        assert str(raised.value) == "the model is a teapot; use another"
        with pytest.raises(ConfigError):
            system.wait()
        assert_nothing_left("t", system.pids())


def test_crash_while_starting_gives_the_last_line_of_the_log() -> None:
    with (
        System(fake_config(), processes=fakes(kv_daemon="crash")) as system,
        pytest.raises(ProcessFailedError, match=r"kv-daemon .*status 3 \(ValueError: last words\)"),
    ):
        system.wait_ready()


def test_deadline_names_the_late_process() -> None:
    policy = Policy(ready_timeout_s=6.0)
    with (
        System(fake_config(), processes=fakes(stage_1="never-ready"), policy=policy) as system,
        pytest.raises(ProcessFailedError, match=r"not ready after 6 s: .* for .*stage-1"),
    ):
        system.wait_ready()


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP])
def test_a_coordinator_that_dies_or_hangs_is_replaced(signum: signal.Signals) -> None:
    notices: list[str] = []
    config = replace(fake_config(), hung_after_s=2.0)
    with System(config, processes=fakes(), on_notice=notices.append) as system:
        system.wait_ready()
        pids = system.pids()
        os.kill(pids["coordinator"], signum)
        eventually(lambda: "ready again" in notices, "a new coordinator")
        assert system.pids() == pids | {"coordinator": system.pids()["coordinator"]}
        assert system.pids()["coordinator"] != pids["coordinator"]
        system.stop(drain=True)
    assert ("coordinator has said nothing for 2 s; killing it" in notices) == (
        signum == signal.SIGSTOP
    )
    assert_nothing_left("t", pids)


def test_a_coordinator_that_dies_while_draining_ends_everything() -> None:
    with System(fake_config(), processes=fakes(coordinator="never-drained")) as system:
        system.wait_ready()
        pids = system.pids()
        system.request_stop(drain=True)
        eventually(lambda: system.phase is Phase.DRAINING, "draining")
        os.kill(pids["coordinator"], signal.SIGKILL)
        with pytest.raises(ProcessFailedError, match="coordinator was killed by SIGKILL"):
            system.wait()
    assert_nothing_left("t", pids)


def test_stubborn_process_is_killed() -> None:
    policy = Policy(stop_grace_s=0.2)
    with System(fake_config(), processes=fakes(stage_0="stubborn"), policy=policy) as system:
        system.wait_ready()
        pids = system.pids()
        system.stop(drain=True)
    assert_nothing_left("t", pids)


def test_program_that_does_not_exist() -> None:
    def specs(config: EngineConfig, run_dir: Path) -> tuple[ProcessSpec, ...]:
        return (*fakes()(config, run_dir)[:2], ProcessSpec("stage-0", ("/no/such/program",)))

    with (
        System(fake_config(stages=1), processes=specs) as system,
        pytest.raises(ProcessFailedError, match="stage-0 could not be started"),
    ):
        system.wait_ready()


def test_second_system_of_the_same_name_is_refused_and_harms_nothing() -> None:
    with System(fake_config(), processes=fakes()) as system:
        system.wait_ready()
        with pytest.raises(AlreadyRunningError, match=f"launcher pid {os.getpid()}"):
            System(fake_config(), processes=fakes()).start()
        assert load_config(system.run_dir) == system.config
        system.stop(drain=True)


def test_failing_start_gives_the_lock_back() -> None:
    def broken(config: EngineConfig, run_dir: Path) -> tuple[ProcessSpec, ...]:
        raise ConfigError("no")

    with pytest.raises(ConfigError):
        System(fake_config(), processes=broken).start()
    assert_nothing_left("t", {})


def test_temporary_system_leaves_no_run_directory_but_the_logs_of_a_failure() -> None:
    with System(fake_config("x-1"), processes=fakes(), temporary=True) as system:
        system.wait_ready()
    assert not system.run_dir.exists()
    with (
        System(fake_config("x-2"), processes=fakes(stage_0="fatal"), temporary=True) as system,
        pytest.raises(ConfigError),
    ):
        system.wait_ready()
    assert not system.run_dir.exists()
    with (
        System(fake_config("x-3"), processes=fakes(stage_0="crash"), temporary=True) as system,
        pytest.raises(ProcessFailedError, match="x-3/logs"),
    ):
        system.wait_ready()
    assert "last words" in (system.run_dir / "logs" / "stage-0.log").read_text()


def test_sweep_removes_only_what_dead_processes_left() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    root = run_dir_of("x").parent
    alive = {f"batch-{os.getpid()}", f"batch-1-{os.getpid()}", "batch-of-mine", "other"}
    for name in (f"batch-{child.pid}", f"batch-1-{child.pid}", *alive):
        (root / name).mkdir(mode=0o700)
    rundir_files.sweep(root, "batch")
    assert {path.name for path in root.iterdir()} == alive
