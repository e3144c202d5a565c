"""Engines that take turns on the same requests: our own, started here, and what a peer must be."""

import contextlib
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import typer

from pipemax.client import Client, SamplingParams
from pipemax.proto.config import EngineConfig
from pipemax.proto.errors import ConfigError, PipemaxSystemError
from pipemax.proto.sizes import format_size
from pipemax.services.bench.outcome import Side
from pipemax.services.bench.processes import cpu_seconds
from pipemax.services.bench.work import BenchRequest, Work
from pipemax.services.cli.options import EngineOptions
from pipemax.services.engine_config import build_config
from pipemax.services.launcher.rundir_files import own_name
from pipemax.services.launcher.system import System
from pipemax.services.own_system import own_system

PURPOSE = "bench"
_numbers = itertools.count()
WARM_UP_REQUESTS, WARM_UP_TOKENS = 8, 4
"""Run before the first round on each side, untimed: what is compiled at its first use is compiled
then."""


class Engine(Protocol):
    """Is started, warm and idle."""

    @property
    def name(self) -> str:
        """With its version."""
        ...

    @property
    def start_up_s(self) -> float: ...

    @property
    def about(self) -> dict[str, Any]:
        """What else is recorded of it."""
        ...

    def run(self, work: Work) -> float:
        """Seconds from the first request's submission to the last one's end. Raises
        PipemaxSystemError when a request failed or has not the length asked for."""
        ...

    def cpu_seconds(self) -> float:
        """CPU time that its processes have used."""
        ...


class OurEngine:
    """A running system, as its clients see it: coordinator, KV daemon, sampling and detokenisation
    are all in the time of a round."""

    def __init__(self, system: System, client: Client, name: str, start_up_s: float) -> None:
        self.name = name
        self.start_up_s = start_up_s
        self._system = system
        self._client = client
        self._config = system.config

    @property
    def config(self) -> EngineConfig:
        return self._config

    @property
    def client(self) -> Client:
        return self._client

    def pids(self) -> dict[str, int]:
        """Of its processes, by name."""
        return self._system.pids()

    @property
    def about(self) -> dict[str, Any]:
        config = self._config
        return {
            "model": config.model,
            "dtype": config.dtype,
            "device": config.device,
            "pipeline_parallel_size": config.pipeline_parallel_size,
            "layer_split": list(config.layer_split),
            "threads_per_stage": config.threads_per_stage,
            "kv_cache_memory_bytes": config.kv_cache_memory_bytes,
            "kv_offloading_bytes": config.kv_offloading_bytes,
            "block_size": config.block_size,
            "max_num_seqs": config.max_num_seqs,
            "max_num_batched_tokens": config.max_num_batched_tokens,
            "sampler_workers": config.sampler_workers,
            "enable_prefix_caching": config.enable_prefix_caching,
            "policy": config.policy,
        }

    def run(self, work: Work) -> float:
        prompts = [request.prompt_token_ids for request in work]
        sampling = [
            SamplingParams(temperature=0.0, max_tokens=request.output_tokens, ignore_eos=True)
            for request in work
        ]
        started = time.perf_counter()
        done = self._client.generate(prompts, sampling)
        seconds = time.perf_counter() - started
        for completion in done:
            if completion.error is not None:
                raise PipemaxSystemError(f"a request failed: {completion.error}")
        check_lengths(self.name, [len(completion.token_ids) for completion in done], work)
        return seconds

    def cpu_seconds(self) -> float:
        return cpu_seconds(*self.pids().values())


@contextlib.contextmanager
def our_engine(options: EngineOptions, longest_tokens: int, name: str) -> Iterator[OurEngine]:
    """Started for the block. `longest_tokens`: of one request, prompt and output.

    Raises ConfigError when it cannot hold that, or as `build_config`.
    """
    system_name = own_name(f"{PURPOSE}-{next(_numbers)}")  # several may run at once
    config = build_config(options, system_name, lambda line: typer.echo(line, err=True))
    if config.max_model_len < longest_tokens:
        raise ConfigError(
            f"a request of the data set has {longest_tokens} tokens, and the system holds "
            f"{config.max_model_len} at most: raise --max-model-len or --kv-cache-memory-bytes "
            f"({format_size(config.pool_bytes)} now), or take shorter requests"
        )
    started = time.perf_counter()
    with (
        own_system(config, ready_timeout_s=options.ready_timeout, temporary=True) as system,
        Client(config.name, label="bench") as client,
    ):
        yield OurEngine(system, client, name, time.perf_counter() - started)


def check_lengths(name: str, found: Sequence[int], work: Work) -> None:
    """Raises PipemaxSystemError when an engine gave another number of tokens than was asked for."""
    for index, (tokens, request) in enumerate(zip(found, work, strict=True)):
        if tokens != request.output_tokens:
            raise PipemaxSystemError(
                f"{name}: request {index} has {tokens} output tokens, not the "
                f"{request.output_tokens} that were asked for: its time would mean nothing"
            )


def warm_up_work(work: Work) -> Work:
    """A few of the requests, cut short, whose prompts no round has."""
    return tuple(
        BenchRequest(request.prompt_token_ids[::-1], min(request.output_tokens, WARM_UP_TOKENS))
        for request in work[:WARM_UP_REQUESTS]
    )


def take_turns(engines: Sequence[Engine], rounds: Sequence[Work]) -> tuple[Side, ...]:
    """Each engine runs the same requests in each round; who begins changes every round."""
    seconds: list[list[float]] = [[] for _ in engines]
    idle = [Idle() for _ in engines]
    for engine in engines:
        engine.run(warm_up_work(rounds[0]))
    for number, work in enumerate(rounds):
        order = range(len(engines))
        for index in reversed(order) if number % 2 else order:
            others = [other for other in order if other != index]
            before = [engines[other].cpu_seconds() for other in others]
            seconds[index].append(engines[index].run(work))
            for other, used in zip(others, before, strict=True):
                idle[other].cpu_s += engines[other].cpu_seconds() - used
                idle[other].seconds += seconds[index][-1]
    return tuple(
        Side(engine.name, engine.start_up_s, tuple(taken), engine.about, spent.cores)
        for engine, taken, spent in zip(engines, seconds, idle, strict=True)
    )


@dataclass(slots=True)
class Idle:
    """What an engine used of the cores while others had their rounds."""

    cpu_s: float = 0.0
    seconds: float = 0.0

    @property
    def cores(self) -> float:
        return self.cpu_s / self.seconds if self.seconds else 0.0
