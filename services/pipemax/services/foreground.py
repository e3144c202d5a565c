"""A system in the foreground of a terminal: signals in, a few lines out."""

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType

import typer

from pipemax.proto.rundir import LOG_DIR
from pipemax.services.launcher.supervisor import Phase
from pipemax.services.launcher.system import System

_DRAIN_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SHOW_EVERY_S = 1.0
_START_OF_LINE = "\r\x1b[K"
"""On a terminal: over the line that was there."""
_LOG_EVERY = 30
"""Without a terminal, every so many looks leave a line."""


def run_until_stopped(system: System) -> None:
    """Starts the system and returns when someone stopped it. Raises what `System.wait` raises."""
    stop_signals: dict[signal.Signals, Callable[[], None]] = {
        signum: lambda: system.request_stop(drain=True) for signum in _DRAIN_SIGNALS
    }
    stop_signals[signal.SIGQUIT] = lambda: system.request_stop(drain=False)
    name = system.config.name
    with system, handlers(stop_signals):
        typer.echo(f"starting {name}; logs are in {system.run_dir / LOG_DIR}", err=True)
        if system.wait_ready():
            typer.echo(ready_line(system))
        looks = 0
        while not system.wait(_SHOW_EVERY_S):
            if system.phase is Phase.DRAINING:
                _show_draining(system, looks)
                looks += 1
        typer.echo(
            f"{_START_OF_LINE if looks and sys.stderr.isatty() else ''}{name} stopped", err=True
        )


def ready_line(system: System) -> str:
    """What runs, where it is measured, how to send work; one line."""
    config = system.config
    stages = "stage" if config.pipeline_parallel_size == 1 else "stages"
    selector = "" if config.name == "default" else f" --name {config.name}"
    return (
        f"{config.name} is ready: {config.served_model_name}, "
        f"{config.pipeline_parallel_size} {stages}, "
        f"at most {config.max_model_len} tokens per request; "
        f"look at http://{config.metrics_host}:{system.metrics_port}/, "
        f"metrics http://{config.metrics_host}:{system.metrics_port}/metrics; "
        f"{_doors(system)}"
        f"send work with `pipemax run-batch{selector} -i in.jsonl -o out.jsonl` "
        f"or pipemax.client.Client({config.name!r})"
    )


def _doors(system: System) -> str:
    endpoint = system.client_endpoint
    return "" if endpoint is None else f"clients on other machines connect to {endpoint}; "


def _show_draining(system: System, looks: int) -> None:
    status = system.status
    if status is None:
        return
    left = status.requests_waiting + status.requests_running
    line = f"finishing {left} accepted requests; once more Ctrl-C stops at once"
    if sys.stderr.isatty():
        typer.echo(f"{_START_OF_LINE}{line}", err=True, nl=False)
    elif looks % _LOG_EVERY == 0:
        typer.echo(line, err=True)


@contextlib.contextmanager
def handlers(actions: dict[signal.Signals, Callable[[], None]]) -> Iterator[None]:
    """Calls the action of each signal that comes while the block runs. Main thread only. A signal
    that our parent made us ignore (nohup) stays ignored."""

    def handle(signum: int, frame: FrameType | None) -> None:
        actions[signal.Signals(signum)]()

    before = {}
    for signum in actions:
        if signal.getsignal(signum) is not signal.SIG_IGN:
            before[signum] = signal.signal(signum, handle)
    try:
        yield
    finally:
        for signum, previous in before.items():
            signal.signal(signum, previous)
