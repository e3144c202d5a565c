"""Batch files run by replicas on a Ray cluster: what `pipemax run-batch --ray-address` does.

This process reads the lines, knows which are to run, and writes results; Ray carries batches of
lines to replicas and rows of results back, and does so again for what was lost with a node.
"""

import contextlib
import importlib
import logging
import os
import re
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import typer

from pipemax.proto.config import EngineConfig
from pipemax.proto.errors import ConfigError, PipemaxError, PipemaxSystemError, RequestError
from pipemax.ray.sizing import Needs, needs_of, replicas_in, sizing
from pipemax.ray.spool import Spool
from pipemax.services.batch.report import BatchProgress, BatchReport
from pipemax.services.batch.tally import Line, Route, Tally
from pipemax.services.cli.options import EngineOptions
from pipemax.services.engine_config import check_options
from pipemax.services.own_system import unwound_by_signals

if TYPE_CHECKING:
    from pipemax.services.batch.command import Work

_CONNECT_TIMEOUT_S = 10.0
_REASON = re.compile(r"^(?:pipemax\.proto\.errors\.|ModuleNotFoundError: )(.*)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class RayOptions:
    """What a user asked for."""

    address: str
    """`auto`, `local` or host:port."""
    replicas: int | None = None
    """None: as many as there is room for."""
    batch_size: int | None = None
    """Rows; None: see `sizing.sizing`."""


class RayCluster:
    """Does the work of a batch on the cluster at an address."""

    def __init__(
        self, engine: EngineOptions, options: RayOptions, request_timeout_s: float | None = None
    ) -> None:
        """Raises ConfigError for what cannot work, also when Ray is not installed."""
        _refuse(engine, options)
        self.config: EngineConfig = check_options(engine, "ray")
        self._options = options
        self._request_timeout_s = request_timeout_s
        self._engine = engine
        if Path(self.config.model).is_dir() or not engine.device.startswith("modelled"):
            model = str(Path(self.config.model).expanduser().absolute())
            served = self.config.served_model_name
            self._engine = replace(engine, model=model, served_model_name=served)
            self.config = check_options(self._engine, "ray")

    @contextlib.contextmanager
    def working(self) -> Iterator["Work"]:
        """Connected to the cluster while the block runs. Raises ConfigError when nobody answers at
        the address, or no node has room for a replica."""
        # In this order: Ray's own handlers, set when it connects, would abort.
        with _ray(self._options.address) as ray, unwound_by_signals():
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            needs = needs_of(
                nodes,
                device=self._engine.device,
                stages=self.config.pipeline_parallel_size,
                threads=self._engine.threads_per_stage,
            )
            replicas = self._options.replicas or replicas_in(nodes, needs)
            replica = _given(self._engine_on(needs))
            if self._request_timeout_s is not None:
                replica["request_timeout_s"] = self._request_timeout_s
            job = _Job(
                replica=replica,
                model_name=self.config.served_model_name,
                needs=needs,
                replicas=replicas,
                capacity=self.config.pipeline_parallel_size * self.config.max_num_seqs,
                batch_size=self._options.batch_size,
            )
            yield job.run_batch

    def _engine_on(self, needs: Needs) -> EngineOptions:
        """A replica uses the CPUs that it asks Ray for, not all of its machine."""
        if self._engine.device != "cpu":
            return self._engine
        threads = max(1, needs.amount // self.config.pipeline_parallel_size)
        return replace(self._engine, threads_per_stage=threads)


@dataclass(slots=True, kw_only=True)
class _Job:
    """One batch on a cluster."""

    replica: dict[str, Any]
    """What each is made with."""
    model_name: str
    needs: Needs
    replicas: int
    capacity: int
    batch_size: int | None
    _seen: bytearray = field(default_factory=bytearray)
    """A bit for each row whose result was written."""

    def run_batch(
        self, routes: Sequence[Route], progress: BatchProgress, num_requests: int | None
    ) -> BatchReport:
        """As `services.batch.job.run_batch`; a pipe is read to its end before the first line
        runs. Raises PipemaxSystemError when Ray gives up or a replica cannot start."""
        progress.start(num_requests)
        tally = Tally(routes, self.model_name, progress)
        started_at = time.monotonic()
        with Spool() as spool:
            index_of = {id(route): index for index, route in enumerate(routes)}
            for line, _ in tally.wanted():
                assert line.text is not None
                spool.add(index_of[id(line.route)], line.file, line.number, line.text)
            self._seen = bytearray(spool.num_rows // 8 + 1)
            written = 0
            if spool.num_rows:
                for table in self._results(spool):
                    written += sum(self._write(tally, routes, row) for row in table.to_pylist())
            if written != spool.num_rows:
                raise PipemaxSystemError(
                    f"Ray brought back {written} of {spool.num_rows} results; run the batch again: "
                    "it goes on where it stopped"
                )
        tally.report.seconds = time.monotonic() - started_at
        return tally.report

    def _results(self, spool: Spool) -> Iterator[Any]:
        """Tables of rows, as replicas finish batches."""
        from ray.data import ActorPoolStrategy, DataContext

        from pipemax.ray.replica import Replica
        from pipemax.ray.source import dataset

        size = sizing(spool.num_rows, self.replicas, self.capacity, self.batch_size)
        typer.echo(
            f"{spool.num_rows} requests for {self.replicas} "
            f"{'replica' if self.replicas == 1 else 'replicas'} of {self.needs.amount} "
            f"{self.needs.resource}s each, {size.batch_rows} requests in a batch, at most "
            f"{size.at_once} batches in a replica",
            err=True,
        )
        context = DataContext.get_current()
        context.enable_progress_bars = False
        context.max_consecutive_actor_init_deaths = 0  # what cannot start here will not later
        results = dataset(spool, size.batch_rows).map_batches(
            Replica,
            fn_constructor_kwargs=self.replica,
            batch_size=None,  # a block is a batch
            batch_format="pyarrow",
            compute=ActorPoolStrategy(
                size=self.replicas,
                max_concurrent_calls_per_actor=size.at_once,
                max_tasks_in_flight_per_actor=size.at_once,  # what waits, another may take
            ),
            **self.needs.remote_args,
        )
        try:
            yield from results.iter_batches(batch_size=None, batch_format="pyarrow")
        except PipemaxError:
            raise
        except Exception as error:
            raise PipemaxSystemError(
                f"a replica failed: {_reason_of(error)}; what was finished is kept"
            ) from error

    def _write(self, tally: Tally, routes: Sequence[Route], row: dict[str, Any]) -> bool:
        """Whether it was not written before: Ray may run a batch again that it has lost."""
        byte, bit = divmod(row["position"], 8)
        if self._seen[byte] >> bit & 1:
            return False
        self._seen[byte] |= 1 << bit
        line = Line(routes[row["route"]], row["file"], row["number"], None)
        if row["error"] is None:
            result = row["result"].encode()
            tally.succeed(line, result, row["prompt_tokens"], row["output_tokens"])
        else:
            # The replica did not know the number of the line, which its error line is to have.
            response = msgspec.json.decode(row["result"])["response"]
            error = RequestError(row["error_code"], row["error"])
            request_id, body = response["request_id"], response["body"]
            tally.fail(line, row["custom_id"], request_id, row["status_code"], error, body)
        return True


def _refuse(engine: EngineOptions, options: RayOptions) -> None:
    """What does not go together."""
    if options.address.startswith("ray://"):
        raise ConfigError(
            f"--ray-address {options.address}: Ray's client is not supported; run this on a node "
            "of the cluster, with `auto` or HOST:PORT"
        )
    if engine.gpus is not None:
        raise ConfigError(
            f"--gpus {engine.gpus}: with --ray-address, Ray says which GPUs a replica gets; leave "
            "it out"
        )
    if engine.metrics_port:
        raise ConfigError(
            f"--metrics-port {engine.metrics_port}: replicas on one node would both want it; leave "
            "it out"
        )
    for flag, number in (("replicas", options.replicas), ("batch-size", options.batch_size)):
        if number is not None and number < 1:
            raise ConfigError(f"--ray-{flag} {number}: must be at least 1")


def _given(engine: EngineOptions) -> dict[str, Any]:
    """What is not the default, so that a replica may be of a version with other options."""
    values = asdict(engine)
    return {
        entry.name: values[entry.name]
        for entry in fields(engine)
        if values[entry.name] != entry.default
    }


@contextlib.contextmanager
def _ray(address: str) -> Iterator[Any]:
    """The module, connected."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when Ray is imported
    try:
        ray = importlib.import_module("ray")
        importlib.import_module("ray.data")
    except ImportError as error:
        raise ConfigError(
            f"--ray-address needs Ray Data ({error}); pip install 'pipemax[ray]'"
        ) from error
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # errors come as exceptions
    try:
        _check_answers(address)
        ray.init(
            address=address,
            logging_level=logging.ERROR,
            log_to_driver=False,
            **({"include_dashboard": False} if address == "local" else {}),
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"--ray-address {address}: no cluster answers ({' '.join(str(error).split())}); start "
            "one with `ray start --head`, or give `local` for this machine alone"
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Raises OSError when nobody does: Ray itself would try for ten minutes. ValueError for what is
    no address."""
    if address in ("auto", "local"):
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError("write auto, local or HOST:PORT")
    with socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_TIMEOUT_S):
        pass


def _reason_of(error: BaseException) -> str:
    """Ray's errors hold the traceback of the actor as text; ours are one line in it."""
    found = _REASON.findall(str(error))
    if found:
        return str(found[-1]).partition(": ")[2] or str(found[-1])
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
