"""The supervisor core, without processes: every rule, and random events against its invariants."""

import signal

from hypothesis import given
from hypothesis import strategies as st

from pipemax.proto.process import EXIT_FATAL
from pipemax.services.launcher import commands as do
from pipemax.services.launcher import events as on
from pipemax.services.launcher.supervisor import (
    EXIT_BAD_CONFIG,
    EXIT_FAILED,
    EXIT_OK,
    Phase,
    Policy,
    Supervisor,
)

NAMES = ("coordinator", "kv-daemon", "stage-0", "stage-1")
POLICY = Policy(
    ready_timeout_s=100.0,
    backoff_first_s=1.0,
    backoff_most_s=8.0,
    flapping_deaths=3,
    flapping_window_s=60.0,
    stop_grace_s=5.0,
)


def started() -> Supervisor:
    supervisor = Supervisor(NAMES, POLICY)
    commands = supervisor.handle(on.Begin(), 0.0)
    assert commands == [do.StartProcess(name) for name in NAMES]
    return supervisor


def ready() -> Supervisor:
    supervisor = started()
    assert supervisor.handle(on.SystemReady(), 1.0) == [do.AnnounceReady(recovered=False)]
    return supervisor


def signals(commands: list[do.Command]) -> dict[str, int]:
    return {
        command.process: command.signum for command in commands if isinstance(command, do.Signal)
    }


def leave(supervisor: Supervisor, now: float) -> list[do.Command]:
    """Every live process exits; returns the last one's commands."""
    commands: list[do.Command] = []
    for name in supervisor.running():
        commands = supervisor.handle(on.ProcessExited(name, -signal.SIGTERM), now)
    return commands


def test_dead_stage_is_restarted_after_a_growing_pause() -> None:
    supervisor = ready()
    for now, pause in ((10.0, 1.0), (20.0, 2.0), (30.0, 4.0)):
        [notice] = supervisor.handle(on.ProcessExited("stage-1", -signal.SIGKILL), now)
        assert isinstance(notice, do.Announce)
        assert "stage-1 was killed by SIGKILL" in notice.text
        assert supervisor.phase is Phase.RECOVERING
        assert supervisor.handle(on.Tick(), now + pause - 0.01) == []
        assert supervisor.handle(on.Tick(), now + pause) == [do.StartProcess("stage-1")]
        assert supervisor.handle(on.SystemReady(), now + 8) == [do.AnnounceReady(recovered=True)]
        assert supervisor.phase is Phase.READY


def test_ready_from_before_a_death_does_not_count() -> None:
    supervisor = ready()
    supervisor.handle(on.ProcessExited("stage-1", 1), 10.0)
    assert supervisor.handle(on.SystemReady(), 10.1) == []
    assert supervisor.phase is Phase.RECOVERING


def test_old_deaths_are_forgotten() -> None:
    supervisor = ready()
    for now in (10.0, 100.0, 200.0, 300.0, 400.0, 500.0):
        supervisor.handle(on.ProcessExited("kv-daemon", 1), now)
        restart_at = now + POLICY.backoff_first_s
        assert supervisor.handle(on.Tick(), restart_at) == [do.StartProcess("kv-daemon")]
    assert supervisor.error is None


def test_flapping_process_ends_the_system() -> None:
    supervisor = ready()
    for now in (10.0, 20.0, 30.0):
        supervisor.handle(on.ProcessExited("stage-0", 1), now)
        supervisor.handle(on.Tick(), now + 8)
    commands = supervisor.handle(on.ProcessExited("stage-0", 1, "MemoryError"), 40.0)
    assert signals(commands) == dict.fromkeys(
        ("coordinator", "kv-daemon", "stage-1"), signal.SIGTERM
    )
    assert supervisor.error is not None
    assert "stage-0 exited with status 1 (MemoryError): 4 deaths" in supervisor.error
    assert leave(supervisor, 41.0) == [do.Finish()]
    assert supervisor.exit_code == EXIT_FAILED


def test_process_that_cannot_work_is_not_restarted() -> None:
    supervisor = started()
    commands = supervisor.handle(on.ProcessExited("stage-0", EXIT_FATAL, "no such model"), 2.0)
    assert set(signals(commands)) == {"coordinator", "kv-daemon", "stage-1"}
    assert (supervisor.error, supervisor.exit_code) == ("no such model", EXIT_BAD_CONFIG)


def test_first_failure_is_the_one_reported() -> None:
    supervisor = started()
    supervisor.handle(on.ProcessExited("stage-0", EXIT_FATAL, "the cause"), 2.0)
    supervisor.handle(on.ProcessExited("stage-1", EXIT_FATAL, "a consequence"), 2.1)
    supervisor.handle(on.ProcessExited("coordinator", 1), 2.2)
    assert supervisor.error == "the cause"


def test_failure_before_the_first_ready_is_not_tried_again_but_a_signal_is() -> None:
    supervisor = started()
    supervisor.handle(on.ProcessExited("stage-0", 1, "ImportError: x"), 2.0)
    assert supervisor.error == "stage-0 exited with status 1 (ImportError: x) while starting"
    supervisor = started()
    supervisor.handle(on.ProcessExited("stage-0", -signal.SIGKILL), 2.0)
    assert supervisor.error is None
    assert supervisor.handle(on.Tick(), 3.0) == [do.StartProcess("stage-0")]


def test_a_dead_coordinator_is_restarted_but_not_while_draining() -> None:
    supervisor = ready()
    supervisor.handle(on.ProcessExited("coordinator", -signal.SIGSEGV), 5.0)
    assert supervisor.phase is Phase.RECOVERING
    assert supervisor.handle(on.Tick(), 6.0) == [do.StartProcess("coordinator")]
    assert supervisor.handle(on.SystemReady(), 7.0) == [do.AnnounceReady(recovered=True)]
    supervisor.handle(on.StopRequested(drain=True), 8.0)
    commands = supervisor.handle(on.ProcessExited("coordinator", -signal.SIGSEGV), 9.0)
    assert set(signals(commands)) == {"kv-daemon", "stage-0", "stage-1"}
    assert supervisor.error == (
        "the coordinator was killed by SIGSEGV while draining; what clients had unfinished is lost"
    )


def test_a_process_that_hangs_is_killed_and_so_restarted() -> None:
    supervisor = ready()
    announced, kill = supervisor.handle(on.Unresponsive("stage-1", 61.2), 70.0)
    assert announced == do.Announce("stage-1 has said nothing for 61 s; killing it")
    assert kill == do.Signal("stage-1", signal.SIGKILL)
    supervisor.handle(on.ProcessExited("stage-1", -signal.SIGKILL), 70.1)
    assert supervisor.handle(on.Unresponsive("stage-1", 61.2), 70.2) == [], "it is dead already"
    assert supervisor.handle(on.Tick(), 71.2) == [do.StartProcess("stage-1")]
    assert supervisor.handle(on.Unresponsive("stage-9", 61.2), 71.3) == [], "there is none"


def test_deadline_names_the_late_processes() -> None:
    supervisor = started()
    supervisor.handle(on.MissingReported(("stage-1",)), 5.0)
    assert supervisor.handle(on.Tick(), 99.9) == []
    commands = supervisor.handle(on.Tick(), 100.0)
    assert set(signals(commands)) == set(NAMES)
    assert supervisor.error is not None
    assert "still waiting for stage-1" in supervisor.error


def test_recovery_has_a_deadline_too() -> None:
    supervisor = ready()
    supervisor.handle(on.ProcessExited("stage-0", 1), 200.0)
    supervisor.handle(on.Tick(), 201.0)
    supervisor.handle(on.Tick(), 300.9)
    assert supervisor.error is None
    supervisor.handle(on.Tick(), 301.0)
    assert supervisor.error is not None


def test_first_stop_drains_and_second_does_not_wait() -> None:
    supervisor = ready()
    assert supervisor.handle(on.StopRequested(drain=True), 5.0) == [do.SendDrain()]
    assert supervisor.phase is Phase.DRAINING
    assert supervisor.handle(on.Tick(), 5e6) == []  # as long as the accepted requests take
    commands = supervisor.handle(on.StopRequested(drain=True), 6e6)
    assert signals(commands) == dict.fromkeys(NAMES, signal.SIGTERM)


def test_drained_system_stops_and_stubborn_processes_are_killed() -> None:
    supervisor = ready()
    supervisor.handle(on.StopRequested(drain=True), 5.0)
    assert set(signals(supervisor.handle(on.Drained(), 9.0))) == set(NAMES)
    for name in NAMES[1:]:
        assert supervisor.handle(on.ProcessExited(name, 0), 9.5) == []
    assert supervisor.handle(on.Tick(), 13.9) == []
    assert supervisor.handle(on.Tick(), 14.0) == [do.Signal("coordinator", signal.SIGKILL)]
    assert supervisor.handle(on.ProcessExited("coordinator", -signal.SIGKILL), 14.1) == [
        do.Finish()
    ]
    assert (supervisor.exit_code, supervisor.error) == (EXIT_OK, None)


def test_stop_while_stopping_kills_at_once() -> None:
    supervisor = ready()
    supervisor.handle(on.StopRequested(drain=False), 5.0)
    commands = supervisor.handle(on.StopRequested(drain=False), 5.1)
    assert signals(commands) == dict.fromkeys(NAMES, signal.SIGKILL)


def test_stop_before_ready_does_not_drain() -> None:
    supervisor = started()
    commands = supervisor.handle(on.StopRequested(drain=True), 1.0)
    assert signals(commands) == dict.fromkeys(NAMES, signal.SIGTERM)


def test_stage_that_dies_while_draining_is_restarted() -> None:
    supervisor = ready()
    supervisor.handle(on.StopRequested(drain=True), 5.0)
    supervisor.handle(on.ProcessExited("stage-0", -signal.SIGKILL), 6.0)
    assert supervisor.handle(on.Tick(), 7.0) == [do.StartProcess("stage-0")]
    assert supervisor.phase is Phase.DRAINING
    assert supervisor.handle(on.SystemReady(), 8.0) == []
    assert supervisor.handle(on.Tick(), 8e6) == []


def test_process_that_cannot_be_started_ends_the_system() -> None:
    supervisor = started()
    supervisor.handle(on.StartFailed("stage-1", "out of memory"), 0.1)
    assert supervisor.error == "stage-1 could not be started: out of memory"
    assert "stage-1" not in supervisor.running()


EVENTS = st.one_of(
    st.builds(
        on.ProcessExited,
        st.sampled_from(NAMES),
        st.sampled_from((0, 1, EXIT_FATAL, -signal.SIGKILL)),
    ),
    st.just(on.SystemReady()),
    st.builds(on.Unresponsive, st.sampled_from(NAMES), st.just(60.0)),
    st.just(on.Tick()),
    st.just(on.Drained()),
    st.builds(on.StopRequested, st.booleans()),
)


@given(st.lists(st.tuples(EVENTS, st.floats(0.0, 40.0)), max_size=60))
def test_any_events_keep_the_invariants_and_stopping_always_ends(
    history: list[tuple[on.Event, float]],
) -> None:
    supervisor, now, finishes = started(), 0.0, 0
    for event, pause in history:
        now += pause
        if isinstance(event, on.ProcessExited) and event.process not in supervisor.running():
            continue
        for command in supervisor.handle(event, now):
            finishes += isinstance(command, do.Finish)
            if isinstance(command, do.StartProcess):
                assert supervisor.phase not in (Phase.STOPPING, Phase.STOPPED)
        supervisor.check_invariants()
    for command in supervisor.handle(on.StopRequested(drain=False), now):
        finishes += isinstance(command, do.Finish)
    finishes += leave(supervisor, now).count(do.Finish())
    supervisor.check_invariants()
    assert supervisor.phase is Phase.STOPPED
    assert finishes == 1
