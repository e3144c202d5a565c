"""`pipemax run-batch`: which system runs a batch, and what is printed about it."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import typer

from pipemax.client import Client
from pipemax.proto.config import EngineConfig, load_config
from pipemax.proto.errors import ConfigError, PipemaxSystemError
from pipemax.proto.rundir import launcher_pid, run_dir_of, runtime_root
from pipemax.services.batch.files import Batch, BatchFiles
from pipemax.services.batch.job import run_batch
from pipemax.services.batch.manifest import Setting, settings_of
from pipemax.services.batch.outputs import STDOUT
from pipemax.services.batch.report import BatchProgress, BatchReport
from pipemax.services.batch.tally import Route
from pipemax.services.cli.options import DEFAULT_NAME, EngineOptions
from pipemax.services.engine_config import build_config
from pipemax.services.launcher.rundir_files import own_name, sweep
from pipemax.services.own_system import own_system
from pipemax.services.token_bar import TokenBar
from pipemax.services.where import Where

if TYPE_CHECKING:
    from pipemax.ray.batch import RayOptions

_PURPOSE = "batch"
_LABEL = "run-batch"

Work = Callable[[Sequence[Route], BatchProgress, int | None], BatchReport]
"""Runs the lines of routes, of which so many are left."""


def run_batch_files(
    engine: EngineOptions,
    files: BatchFiles,
    name: str | None,
    elsewhere: Where | None = None,
    request_timeout_s: float | None = None,
    on_ray: "RayOptions | None" = None,
) -> BatchReport:
    """Runs every line that has no result yet and prints what it came to.

    `elsewhere` is a system on another machine, `on_ray` a cluster that gets a system on each of its
    machines. Else, with `name`, the running system of that name does the work, or a new one under
    that name if there is none. Without a name, a model gets a new system of its own, and no model
    means the running system of the default name. Raises ConfigError before anything is loaded when
    input or output cannot be used or a flag cannot work, and PipemaxSystemError when no line was
    served.
    """
    files.check()
    if on_ray is not None:
        from pipemax.ray.batch import RayCluster

        cluster = RayCluster(engine, on_ray, request_timeout_s)
        return _run(files, settings_of(cluster.config), cluster.working())
    if elsewhere is None:
        system = _system_for(engine, name)
        return _run(files, system.settings, _through(system.client(), request_timeout_s))
    if given := engine.given():
        raise ConfigError(
            f"{elsewhere} is running already and keeps its settings: leave out {', '.join(given)}"
        )
    with elsewhere.client(_LABEL) as client:
        through = _through(contextlib.nullcontext(client), request_timeout_s)
        return _run(files, _settings_told(client), through)


def _settings_told(client: Client) -> Mapping[str, Setting]:
    """Of a system elsewhere, which is known by what it says of itself."""
    return {"served_model_name": client.model_name, "system": client.settings}


@contextlib.contextmanager
def _through(
    connecting: AbstractContextManager[Client], request_timeout_s: float | None
) -> Iterator[Work]:
    with connecting as client:
        yield functools.partial(run_batch, client, request_timeout_s=request_timeout_s)


def _run(
    files: BatchFiles, settings: Mapping[str, Setting], working: AbstractContextManager[Work]
) -> BatchReport:
    """`settings`: that results depend on. `working` is entered when there is something to do."""
    batch = Batch(files, settings)
    outputs = ", ".join(str(path) for path in files.outputs)
    if batch.nothing_to_do:
        typer.echo(f"{outputs}: every line has its result already", err=True)
        return BatchReport()
    if batch.continues:
        typer.echo(f"going on with {outputs}", err=True)
    with (
        batch.opened() as (routes, num_requests),
        working as work,
        TokenBar() as bar,
    ):
        report = work(routes, bar, num_requests)
    to_stderr = STDOUT in files.outputs
    typer.echo(report.throughput, err=to_stderr)
    failed = f", {report.failed} of them error lines" if report.failed else ""
    before = f"; {report.skipped} were there before" if report.skipped else ""
    typer.echo(f"{report.requests} results in {outputs}{failed}{before}", err=to_stderr)
    if report.failed and not report.completed and not report.skipped:
        raise PipemaxSystemError(f"no line could be served; the first: {report.first_error}")
    return report


@dataclass(frozen=True, slots=True)
class _SystemFor:
    """The system that does the work, running already or to be started."""

    config: EngineConfig
    ready_timeout_s: float
    runs: bool
    temporary: bool

    @property
    def settings(self) -> Mapping[str, Setting]:
        """That results depend on."""
        return settings_of(self.config)

    @contextlib.contextmanager
    def client(self) -> Iterator[Client]:
        """Of the system, once it is ready."""
        with contextlib.ExitStack() as stack:
            if not self.runs:
                own = own_system(
                    self.config, ready_timeout_s=self.ready_timeout_s, temporary=self.temporary
                )
                stack.enter_context(own)
            yield stack.enter_context(Client(self.config.name, label=_LABEL))


def _system_for(engine: EngineOptions, name: str | None) -> _SystemFor:
    temporary = name is None and bool(engine.model)
    if name is None and not engine.model:
        name = DEFAULT_NAME
    if name is not None and launcher_pid(run_dir_of(name)) is not None:
        if given := engine.given():
            raise ConfigError(
                f"system {name!r} is running already and keeps its settings: leave out "
                f"{', '.join(given)}, or use another --name"
            )
        return _SystemFor(load_config(run_dir_of(name)), engine.ready_timeout, True, False)
    if name is not None and not engine.model:
        raise ConfigError(
            f"no system named {name!r} is running; start one with `pipemax up --name {name}`, "
            "or give --model to start one for this batch"
        )
    sweep(runtime_root(), _PURPOSE)
    own = name or own_name(_PURPOSE)
    config = build_config(engine, own, lambda line: typer.echo(line, err=True))
    return _SystemFor(config, engine.ready_timeout, False, temporary)
