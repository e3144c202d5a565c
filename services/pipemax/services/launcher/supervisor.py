"""What to do when a process dies, when nothing becomes ready, when someone wants to stop.

Pure: `handle(event, now) -> commands` over explicit state; the shell in `system.py` starts and
signals processes. Phases::

    starting ──▶ ready ◀──▶ recovering          a death, or a process that hangs
        │          └────┬───────┘
        │           draining                    first stop request: finish what was accepted
        └───────▶ stopping ──▶ stopped          TERM, after a grace KILL; every child reaped

A coordinator that is started again is greeted by clients with what they had unfinished. While
draining it is not: it could not tell what was accepted before from what is new.
"""

import enum
import signal
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from pipemax.proto.process import EXIT_FATAL
from pipemax.services.launcher import commands as do
from pipemax.services.launcher import events as on

COORDINATOR = "coordinator"
EXIT_OK = 0
EXIT_FAILED = 1
EXIT_BAD_CONFIG = 2
"""A process said that its settings cannot work; the same status as for a bad flag."""


class Phase(enum.Enum):
    STARTING = "starting"
    READY = "ready"
    RECOVERING = "recovering"
    DRAINING = "draining"
    STOPPING = "stopping"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """When to try again and when to give up. All times are seconds."""

    ready_timeout_s: float = 300.0
    """For the first start, and again for each recovery."""
    backoff_first_s: float = 0.2
    """Pause before a restart; doubles with every death inside the window."""
    backoff_most_s: float = 10.0
    flapping_deaths: int = 5
    """More deaths of one process than this inside the window: give up."""
    flapping_window_s: float = 60.0
    stop_grace_s: float = 5.0
    """Between TERM and KILL."""


@dataclass(slots=True)
class _Child:
    running: bool = False
    restart_at: float | None = None
    deaths: deque[float] = field(default_factory=deque)
    """Inside the flapping window, oldest first."""


class Supervisor:
    """Owns the phase and each process's fate. Processes start in the order given."""

    def __init__(self, processes: Sequence[str], policy: Policy) -> None:
        self.phase = Phase.STARTING
        self.exit_code = EXIT_OK
        self.error: str | None = None
        """Why the system failed, one line; None as long as it did not."""
        self._policy = policy
        self._children = {name: _Child() for name in processes}
        self._ready_deadline: float | None = None
        self._kill_at: float | None = None
        self._missing: tuple[str, ...] = ()

    def handle(self, event: on.Event, now: float) -> list[do.Command]:
        """Applies one event. `now` is monotonic seconds and never goes back."""
        match event:
            case on.Begin():
                return self._begin(now)
            case on.ProcessExited():
                return self._process_exited(event, now)
            case on.Unresponsive():
                return self._unresponsive(event)
            case on.StartFailed(process, reason):
                self._children[process].running = False
                return self._fail(f"{process} could not be started: {reason}", EXIT_FAILED, now)
            case on.SystemReady():
                return self._system_ready()
            case on.MissingReported(processes):
                self._missing = processes
                return []
            case on.StopRequested(drain):
                return self._stop_requested(drain, now)
            case on.Drained():
                return self._stop_children(now) if self.phase is Phase.DRAINING else []
            case on.Tick():
                return self._tick(now)

    def running(self) -> tuple[str, ...]:
        """Processes that are alive as far as is known."""
        return tuple(name for name, child in self._children.items() if child.running)

    def check_invariants(self) -> None:
        """Raises AssertionError when the state contradicts itself."""
        for name, child in self._children.items():
            assert not (child.running and child.restart_at is not None), name
            assert len(child.deaths) <= self._policy.flapping_deaths + 1, name
        if self.phase in (Phase.STOPPING, Phase.STOPPED):
            assert all(child.restart_at is None for child in self._children.values())
            assert self._ready_deadline is None
        if self.phase is Phase.STOPPED:
            assert not self.running()
        else:
            assert (self._kill_at is not None) == (self.phase is Phase.STOPPING)
        assert (self.error is None) == (self.exit_code == EXIT_OK)

    # Starting and becoming ready

    def _begin(self, now: float) -> list[do.Command]:
        self._ready_deadline = now + self._policy.ready_timeout_s
        return [self._start(name) for name in self._children]

    def _start(self, name: str) -> do.Command:
        child = self._children[name]
        child.running = True
        child.restart_at = None
        return do.StartProcess(name)

    def _system_ready(self) -> list[do.Command]:
        if self.phase not in (Phase.STARTING, Phase.RECOVERING, Phase.DRAINING):
            return []
        if not all(child.running for child in self._children.values()):
            return []  # said before the coordinator noticed a death; another one will follow
        self._ready_deadline = None
        self._missing = ()
        if self.phase is Phase.DRAINING:
            return []
        recovered = self.phase is Phase.RECOVERING
        self.phase = Phase.READY
        return [do.AnnounceReady(recovered)]

    def _tick(self, now: float) -> list[do.Command]:
        if self._kill_at is not None and now >= self._kill_at:
            self._kill_at = now + self._policy.stop_grace_s
            return [do.Signal(name, signal.SIGKILL) for name in self.running()]
        if self._ready_deadline is not None and now >= self._ready_deadline:
            return self._fail(self._late(), EXIT_FAILED, now)
        due = [
            name
            for name, child in self._children.items()
            if child.restart_at is not None and now >= child.restart_at
        ]
        return [self._start(name) for name in due]

    def _late(self) -> str:
        waiting = [name for name, child in self._children.items() if not child.running]
        late = self._missing or tuple(waiting) or (COORDINATOR,)
        return (
            f"not ready after {self._policy.ready_timeout_s:g} s: still waiting for "
            f"{', '.join(late)}; --ready-timeout gives more time"
        )

    # Deaths

    def _process_exited(self, event: on.ProcessExited, now: float) -> list[do.Command]:
        child = self._children[event.process]
        child.running = False
        if self.phase in (Phase.STOPPING, Phase.STOPPED):
            return self._finish_when_all_left()
        if event.status == EXIT_FATAL:
            reason = event.reason or f"{event.process} cannot work and left no reason"
            return self._fail(reason, EXIT_BAD_CONFIG, now)
        how = describe_exit(event.status, event.reason)
        if event.process == COORDINATOR and self.phase is Phase.DRAINING:
            reason = f"the coordinator {how} while draining; what clients had unfinished is lost"
            return self._fail(reason, EXIT_FAILED, now)
        if self.phase is Phase.STARTING and event.status > 0:
            # What fails before it ever worked fails again. A signal (out of memory) may pass.
            return self._fail(f"{event.process} {how} while starting", EXIT_FAILED, now)
        return self._restart_later(event.process, how, now)

    def _unresponsive(self, event: on.Unresponsive) -> list[do.Command]:
        """A stopped process does not even take a TERM."""
        name, silent_s = event.process, event.silent_s
        alive = name in self._children and self._children[name].running
        if not alive or self.phase in (Phase.STOPPING, Phase.STOPPED):
            return []
        text = f"{name} has said nothing for {silent_s:.0f} s; killing it"
        return [do.Announce(text), do.Signal(name, signal.SIGKILL)]

    def _restart_later(self, name: str, how: str, now: float) -> list[do.Command]:
        policy, child = self._policy, self._children[name]
        child.deaths.append(now)
        while child.deaths[0] < now - policy.flapping_window_s:
            child.deaths.popleft()
        if len(child.deaths) > policy.flapping_deaths:
            return self._fail(
                f"{name} {how}: {len(child.deaths)} deaths in {policy.flapping_window_s:g} s, "
                "giving up",
                EXIT_FAILED,
                now,
            )
        pause = min(policy.backoff_first_s * 2 ** (len(child.deaths) - 1), policy.backoff_most_s)
        child.restart_at = now + pause
        self._ready_deadline = now + pause + policy.ready_timeout_s
        if self.phase is Phase.READY:
            self.phase = Phase.RECOVERING
        return [do.Announce(f"{name} {how}; starting it again in {pause:g} s")]

    def _fail(self, reason: str, exit_code: int, now: float) -> list[do.Command]:
        """The first failure is the cause; what follows from it is not reported."""
        if self.error is None:
            self.error, self.exit_code = reason, exit_code
        return self._stop_children(now)

    # Stopping

    def _stop_requested(self, drain: bool, now: float) -> list[do.Command]:
        if drain and self.phase in (Phase.READY, Phase.RECOVERING):
            self.phase = Phase.DRAINING
            return [do.SendDrain()]
        if self.phase is Phase.STOPPING:
            return [do.Signal(name, signal.SIGKILL) for name in self.running()]
        if self.phase is Phase.STOPPED:
            return []
        return self._stop_children(now)

    def _stop_children(self, now: float) -> list[do.Command]:
        if self.phase in (Phase.STOPPING, Phase.STOPPED):
            return self._finish_when_all_left()
        self.phase = Phase.STOPPING
        self._ready_deadline = None
        self._kill_at = now + self._policy.stop_grace_s
        for child in self._children.values():
            child.restart_at = None
        terminate = [do.Signal(name, signal.SIGTERM) for name in self.running()]
        return [*terminate, *self._finish_when_all_left()]

    def _finish_when_all_left(self) -> list[do.Command]:
        if self.phase is Phase.STOPPED or self.running():
            return []
        self.phase = Phase.STOPPED
        self._kill_at = None
        return [do.Finish()]


def describe_exit(status: int, reason: str | None = None) -> str:
    """`status` as `subprocess` gives it: negative is the signal that ended the process."""
    if status < 0:
        try:
            return f"was killed by {signal.Signals(-status).name}"
        except ValueError:
            return f"was killed by signal {-status}"
    return f"exited with status {status}" + (f" ({reason})" if reason else "")
