"""A running system: the shell around the supervisor.

One thread starts the processes, watches them and speaks with the coordinator; callers ask and wait
from any other thread.
"""

import contextlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Self

from pipemax.proto.config import EngineConfig
from pipemax.proto.errors import ConfigError, ProcessFailedError
from pipemax.proto.messages.ingest import Status
from pipemax.proto.rundir import (
    INGEST_ENDPOINT_FILE,
    LOG_DIR,
    METRICS_PORT_FILE,
    RunLock,
    create_run_dir,
)
from pipemax.services.launcher import commands as do
from pipemax.services.launcher import events as on
from pipemax.services.launcher import rundir_files
from pipemax.services.launcher.link import CoordinatorLink
from pipemax.services.launcher.processes import Children, ProcessSpec, system_processes
from pipemax.services.launcher.supervisor import (
    COORDINATOR,
    EXIT_BAD_CONFIG,
    EXIT_FAILED,
    Phase,
    Policy,
    Supervisor,
)

log = logging.getLogger(__name__)

POLL_S = 0.1
"""Children are reaped at least this often."""
_WANTS_STATUS = (Phase.STARTING, Phase.RECOVERING, Phase.DRAINING)


class System:
    """Starts on entry, stops on exit::

        with System(config) as system:
            system.wait_ready()
            ...

    Leaving the block stops at once; call `stop(drain=True)` before to finish what was accepted.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        policy: Policy | None = None,
        on_notice: Callable[[str], None] = log.info,
        temporary: bool = False,
        processes: Callable[[EngineConfig, Path], Sequence[ProcessSpec]] = system_processes,
    ) -> None:
        """`on_notice` gets one line about each restart, from the system's own thread. A
        `temporary` system's run directory goes with it, unless it failed and left logs to read.
        """
        self.config = config
        self._policy = policy or Policy()
        self._on_notice = on_notice
        self._temporary = temporary
        self._processes = processes
        self._requests: SimpleQueue[on.StopRequested] = SimpleQueue()
        self._changed = threading.Condition()
        self._was_ready = False
        self._ended = False
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.request_stop(drain=False)
        try:
            self._join()
        except BaseException:  # a signal's: whoever sends one more does not want to wait
            self.request_stop(drain=False)
            self._join()
            raise

    # For callers

    def start(self) -> None:
        """Takes the run directory and starts the processes; returns before they are ready.

        Raises AlreadyRunningError when a system of this name runs, ConfigError when the run
        directory cannot be used.
        """
        self.run_dir = create_run_dir(self.config.name)
        self._lock = RunLock(self.run_dir)
        try:
            rundir_files.clean(self.run_dir)
            rundir_files.clean_logs(self.run_dir)
            rundir_files.fill(self.run_dir, self.config)
            specs = tuple(self._processes(self.config, self.run_dir))
            self._supervisor = Supervisor([spec.name for spec in specs], self._policy)
            self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            self._children = Children(specs, self.run_dir)
            self._link = CoordinatorLink(self.run_dir, self._wake_fd, self.config.hung_after_s)
        except BaseException:
            self._clean_run_dir()
            raise
        self._thread = threading.Thread(target=self._run, name="supervisor", daemon=True)
        self._thread.start()

    def wait_ready(self) -> bool:
        """Waits until the system serves requests: True. False when it was stopped before.

        Raises ConfigError when a process said that its settings cannot work, ProcessFailedError
        when one died or was late.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._was_ready or self._ended)
        if self._was_ready:
            return True
        self._raise_failure()
        return False

    def wait(self, timeout_s: float | None = None) -> bool:
        """Waits until every process has left and everything is cleaned up; False when that did
        not happen in time. Raises as `wait_ready` when the system failed."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._ended, timeout_s):
                return False
        self._join()
        self._raise_failure()
        return True

    def request_stop(self, *, drain: bool) -> None:
        """Asks the system to end and returns; a second request ends it at once. May be called
        from a signal handler."""
        self._requests.put(on.StopRequested(drain))
        if not self._ended:
            os.eventfd_write(self._wake_fd, 1)

    def stop(self, *, drain: bool) -> None:
        """Asks the system to end and waits until it has. Raises as `wait_ready`."""
        self.request_stop(drain=drain)
        self.wait()

    @property
    def phase(self) -> Phase:
        return self._supervisor.phase

    @property
    def status(self) -> Status | None:
        """The coordinator's last word while starting, recovering or draining; None before."""
        return self._link.status

    @property
    def failed(self) -> bool:
        """The system ended, or is ending, because something broke."""
        return self._supervisor.error is not None

    @property
    def metrics_port(self) -> int | None:
        """Where /metrics answers, None when the coordinator did not say."""
        try:
            return int((self.run_dir / METRICS_PORT_FILE).read_text())
        except (OSError, ValueError):
            return None

    @property
    def client_endpoint(self) -> str | None:
        """Where clients of other machines connect to, None when there is no such place."""
        try:
            return (self.run_dir / INGEST_ENDPOINT_FILE).read_text()
        except OSError:
            return None

    def pids(self) -> dict[str, int]:
        """Pid of each live process by its name."""
        return self._children.pids()

    def _join(self) -> None:
        if self._thread is not None:
            with self._changed:  # a join that a signal's exception interrupts counts as done
                self._changed.wait_for(lambda: self._ended)
            self._thread.join()
            self._thread = None
            os.close(self._wake_fd)

    def _raise_failure(self) -> None:
        supervisor = self._supervisor
        if supervisor.error is None:
            return
        if supervisor.exit_code == EXIT_BAD_CONFIG:
            raise ConfigError(supervisor.error)
        raise ProcessFailedError(f"{supervisor.error}; logs are in {self.run_dir / LOG_DIR}")

    # The system's own thread

    def _run(self) -> None:
        try:
            self._supervise()
        except Exception as error:
            log.exception("the launcher failed")
            self._supervisor.error = f"the launcher failed: {error!r}"
            self._supervisor.exit_code = EXIT_FAILED
        finally:
            self._clean_up()
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _supervise(self) -> None:
        events: deque[on.Event] = deque([on.Begin()])
        while True:
            while events:
                for command in self._supervisor.handle(events.popleft(), time.monotonic()):
                    if isinstance(command, do.Finish):
                        return
                    events.extend(self._execute(command))
            now = time.monotonic()
            events.extend(self._link.silence(now))
            self._link.keep_in_touch(now, self.phase in _WANTS_STATUS)
            self._link.wait(POLL_S)
            events.extend(self._collect())

    def _collect(self) -> list[on.Event]:
        """What happened since the last call, deaths last: what a process said before it died
        was said first."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake_fd)
        events: list[on.Event] = self._link.receive()
        while not self._requests.empty():
            events.append(self._requests.get())
        for name, status in self._children.reap():
            words = rundir_files.last_words(self.run_dir, name)
            events.append(on.ProcessExited(name, status, words))
        events.append(on.Tick())
        return events

    def _execute(self, command: do.Command) -> list[on.Event]:
        match command:
            case do.StartProcess(name):
                if name == COORDINATOR:
                    self._link.forget()
                try:
                    self._children.start(name)
                except OSError as error:
                    return [on.StartFailed(name, str(error))]
            case do.Signal(name, signum):
                self._children.signal(name, signum)
            case do.SendDrain():
                self._link.send_drain()
            case do.AnnounceReady(recovered):
                if recovered:
                    self._on_notice("ready again")
                with self._changed:
                    self._was_ready = True
                    self._changed.notify_all()
            case do.Announce(text):
                self._on_notice(text)
        return []

    def _clean_up(self) -> None:
        self._children.close()
        self._link.close()
        self._clean_run_dir(keep_logs=self._supervisor.exit_code == EXIT_FAILED)

    def _clean_run_dir(self, *, keep_logs: bool = False) -> None:
        rundir_files.clean(self.run_dir)
        if self._temporary and not keep_logs:
            rundir_files.remove(self.run_dir)
        self._lock.release()
