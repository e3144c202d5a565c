"""A system that lives as long as one command needs it."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import NoReturn

import typer

from pipemax.proto.config import EngineConfig
from pipemax.proto.errors import NotRunningError
from pipemax.proto.rundir import LOG_DIR
from pipemax.services.foreground import handlers
from pipemax.services.launcher.supervisor import Policy
from pipemax.services.launcher.system import System

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


@contextlib.contextmanager
def own_system(
    config: EngineConfig, *, ready_timeout_s: float, temporary: bool
) -> Iterator[System]:
    """Starts a system, waits until it is ready, and stops it at the end of the block, whatever
    ends the block: an exception, Ctrl-C, SIGTERM. Main thread only.

    Raises ConfigError or ProcessFailedError when the system fails, also in place of the
    NotRunningError that a client in the block meets then.
    """
    system = System(
        config,
        policy=Policy(ready_timeout_s=ready_timeout_s),
        on_notice=lambda line: typer.echo(line, err=True),
        temporary=temporary,
    )
    with unwound_by_signals(), system:
        typer.echo(f"starting {config.name}; logs are in {system.run_dir / LOG_DIR}", err=True)
        system.wait_ready()
        try:
            yield system
        except NotRunningError:
            if system.failed:
                system.wait()  # raises the cause
            raise


def unwound_by_signals() -> contextlib.AbstractContextManager[None]:
    """While the block runs, signals that ask to stop end it as Ctrl-C does. Main thread only."""
    return handlers({signum: _leave(signum) for signum in _STOP_SIGNALS})


def _leave(signum: signal.Signals) -> Callable[[], NoReturn]:
    """Ends the command by unwinding it, as Ctrl-C does."""

    def leave() -> NoReturn:
        raise SystemExit(128 + signum)

    return leave
