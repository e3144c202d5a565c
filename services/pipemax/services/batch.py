"""`pipemax run-batch`: which system runs a batch file, and what is printed about it."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import typer

from pipemax.client import Client
from pipemax.proto.errors import ConfigError, PipemaxSystemError
from pipemax.proto.rundir import launcher_pid, run_dir_of, runtime_root
from pipemax.services.batch_job import (
    BatchReport,
    check_input,
    check_output,
    run_batch,
)
from pipemax.services.cli.options import DEFAULT_NAME, EngineOptions
from pipemax.services.engine_config import build_config
from pipemax.services.launcher.rundir_files import own_name, sweep
from pipemax.services.own_system import own_system
from pipemax.services.token_bar import TokenBar

_PURPOSE = "batch"


def run_batch_file(
    engine: EngineOptions, input_path: Path, output_path: Path, name: str | None
) -> BatchReport:
    """Runs every line of a batch file and prints what it came to.

    With `name`, the running system of that name does the work, or a new one under that name if
    there is none. Without a name, a model gets a new system of its own, and no model means the
    running system of the default name. Raises ConfigError before anything is loaded when input or
    output cannot be used or a flag cannot work, and PipemaxSystemError when no line was served.
    """
    check_input(input_path)
    check_output(output_path, input_path)
    with (
        _system_for(engine, name) as system_name,
        Client(system_name, label="run-batch") as client,
        TokenBar() as bar,
    ):
        report = run_batch(client, input_path, output_path, bar)
    typer.echo(report.throughput)
    failed = f", {report.failed} of them error lines" if report.failed else ""
    typer.echo(f"{report.requests} results in {output_path}{failed}")
    if report.failed and not report.completed:
        raise PipemaxSystemError(f"no line could be served; the first: {report.first_error}")
    return report


@contextlib.contextmanager
def _system_for(engine: EngineOptions, name: str | None) -> Iterator[str]:
    """Name of a system that is ready."""
    if name is None and not engine.model:
        name = DEFAULT_NAME
    if name is not None and launcher_pid(run_dir_of(name)) is not None:
        if given := engine.given():
            raise ConfigError(
                f"system {name!r} is running already and keeps its settings: leave out "
                f"{', '.join(given)}, or use another --name"
            )
        yield name
        return
    if name is not None and not engine.model:
        raise ConfigError(
            f"no system named {name!r} is running; start one with `pipemax up --name {name}`, "
            "or give --model to start one for this batch"
        )
    sweep(runtime_root(), _PURPOSE)
    config = build_config(engine, name or own_name(_PURPOSE))
    with own_system(config, ready_timeout_s=engine.ready_timeout, temporary=name is None) as system:
        yield system.config.name
