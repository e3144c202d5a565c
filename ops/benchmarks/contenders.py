"""Engines that are compared on one machine, and rounds in which they take turns.

A `Contender` says what is to be run, `Series` runs several side by side: all are loaded at once,
one works at a time. Each round has prompts of its own, the same for all; the order turns round
every time, so that no one always follows the same neighbour. Every measurement goes to a file of
lines at once: a run that was cut off goes on where it was.
"""

import contextlib
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipemax.proto.errors import ConfigError, PipemaxError
from pipemax.proto.geometry import BlockGeometry, blocks_for
from pipemax.services.bench.engines import Engine, Idle, our_engine, warm_up_work
from pipemax.services.bench.machine import used_cores
from pipemax.services.bench.model_cost import dtype_of, kv_token_bytes
from pipemax.services.bench.outcome import UNFAIR_CORES, Side
from pipemax.services.bench.peers import PeerFlags, Setting, find_peer, peer_engine
from pipemax.services.bench.work import LognormalData
from pipemax.services.cli.options import EngineOptions
from pipemax.services.engine_config import build_config
from pipemax.services.launcher.rundir_files import own_name
from pipemax.services.machine import usable_cores
from pipemax.stage_worker.model.inspect import inspect_model

BLOCK_SIZE = 16
_SPARE_BLOCKS = 8
_HOST_SPARE = 1.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """What is to be run."""

    name: str
    engine: str = "pipemax"
    """Or `vllm`, `transformers`."""
    stages: int = 2
    """Of ours; they share the cores."""
    kv_tokens: int | None = None
    """That the device holds; None: all requests of a round at their full lengths."""
    kv_share: float = 1.0
    """Of that, where `kv_tokens` is None."""
    offloading: bool = False
    """Of ours, with a host pool that holds everything."""
    arguments: tuple[str, ...] = ()
    """Of a peer, KEY=VALUE each; they stand above those of all."""
    environment: tuple[str, ...] = ()
    """Of a peer, NAME=VALUE each; likewise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What all contenders have in common."""

    model: Path
    dtype: str = "auto"
    data: LognormalData
    in_flight: int
    """Requests of ours that run at once, at most."""
    ours: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `EngineOptions`, set for all of ours."""
    peers: Mapping[str, Path] = field(default_factory=dict)
    """Virtual environments by engine."""
    peer_arguments: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """KEY=VALUE, by engine."""
    peer_environment: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def longest_tokens(self) -> int:
        return max(request.total_tokens for request in self.data.round(0))

    @property
    def all_tokens(self) -> int:
        """Of a round's requests at their full lengths, in whole blocks."""
        return BLOCK_SIZE * sum(
            blocks_for(request.total_tokens, BLOCK_SIZE) for request in self.data.round(0)
        )

    def tokens_of(self, contender: Contender) -> int:
        """That a contender's device pool holds."""
        if contender.kv_tokens is not None:
            return contender.kv_tokens
        spare = _SPARE_BLOCKS * BLOCK_SIZE if contender.kv_share == 1.0 else 0
        return int(self.all_tokens * contender.kv_share) + spare


@contextlib.contextmanager
def started(contender: Contender, machine: Machine) -> Iterator[Engine]:
    """Started, warmed up and idle."""
    if contender.engine == "pipemax":
        options = our_options(contender, machine)
        name = f"PipeMax {version('pipemax')}"
        with our_engine(options, machine.longest_tokens, name) as ours:
            yield ours
        return
    with peer_engine(find_peer(*peer_of(contender, machine)), tell) as peer:
        yield peer


def our_options(contender: Contender, machine: Machine) -> EngineOptions:
    """Of equal terms: threads in all as many as cores, the same requests in flight however many
    stages there are, and a pool of so many tokens."""
    host = _HOST_SPARE * machine.all_tokens * kv_token_bytes(machine.model, machine.dtype)
    options = EngineOptions(
        model=str(machine.model),
        dtype=machine.dtype,
        pipeline_parallel_size=contender.stages,
        threads_per_stage=max(1, usable_cores() // contender.stages),
        block_size=BLOCK_SIZE,
        max_model_len=machine.longest_tokens,
        max_num_seqs=-(-machine.in_flight // contender.stages),
        kv_offloading_size=str(int(host)) if contender.offloading else "0",
        enable_prefix_caching=False,
    )
    unknown = machine.ours.keys() - {one.name for one in fields(EngineOptions)}
    if unknown:
        raise ConfigError(f"{', '.join(sorted(unknown))} is no field of EngineOptions")
    options = replace(options, **machine.ours)
    split = build_config(options, own_name("bench")).layer_split
    pool = machine.tokens_of(contender) // BLOCK_SIZE * _block_bytes(max(split), machine)
    return replace(options, layer_split=",".join(map(str, split)), kv_cache_memory_bytes=str(pool))


def _block_bytes(layers: int, machine: Machine) -> int:
    info = inspect_model(machine.model, "dummy")
    dtype = dtype_of(machine.dtype, info)
    return BlockGeometry(layers, BLOCK_SIZE, info.num_kv_heads, info.head_dim, dtype).block_bytes


def peer_of(contender: Contender, machine: Machine) -> tuple[PeerFlags, Setting]:
    name = contender.engine
    flags = PeerFlags(
        against=name,
        place=machine.peers.get(name),
        arguments=(*machine.peer_arguments.get(name, ()), *contender.arguments),
        environment=(*machine.peer_environment.get(name, ()), *contender.environment),
    )
    setting = Setting(
        model=machine.model.absolute(),
        dtype=machine.dtype,
        load_format="auto",
        longest_tokens=machine.longest_tokens,
        kv_bytes=machine.all_tokens * kv_token_bytes(machine.model, machine.dtype),
        enable_prefix_caching=False,
        cores=used_cores(usable_cores()),
    )
    return flags, setting


@dataclass(slots=True)
class Records:
    """Measurements, in a file of JSON lines or in none."""

    path: Path | None
    key: Mapping[str, Any]
    """What makes measurements comparable; others in the file are passed over."""
    lines: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.path is not None and self.path.exists():
            found = [json.loads(line) for line in self.path.read_text().splitlines()]
            self.lines = [line for line in found if line["key"] == self.key]

    def add(self, **measured: Any) -> None:
        line = {"key": dict(self.key), **measured}
        self.lines.append(line)
        if self.path is not None:
            with self.path.open("a") as out:
                out.write(json.dumps(line) + "\n")

    def seconds(self, name: str, number: int) -> float | None:
        for line in self.lines:
            if (line["contender"], line["round"]) == (name, number):
                return float(line["seconds"])
        return None

    def side(self, name: str, rounds: int) -> Side | None:
        """None where a round is missing."""
        mine = {line["round"]: line for line in self.lines if line["contender"] == name}
        if len(mine) < rounds:
            return None
        ordered = [mine[number] for number in range(rounds)]
        return Side(
            ordered[0]["engine"],
            max(line["start_up_s"] for line in ordered),
            tuple(line["seconds"] for line in ordered),
            ordered[0]["about"],
        )


class Series:
    """Contenders that take turns."""

    def __init__(
        self, contenders: Sequence[Contender], machine: Machine, rounds: int, records: Records
    ) -> None:
        self._contenders = contenders
        self._machine = machine
        self._rounds = rounds
        self._records = records
        self._engines: dict[str, Engine] = {}
        self.failed: dict[str, str] = {}
        """By name: why one could not go on. The others did."""

    def run(self) -> dict[str, Side]:
        """Of those that did all rounds."""
        records, rounds = self._records, self._rounds
        left = [one for one in self._contenders if records.side(one.name, rounds) is None]
        with contextlib.ExitStack() as stack:
            for one in left:
                self._start(one, stack)
            for number in range(rounds):
                ordered = list(reversed(left)) if number % 2 else left
                for one in ordered:
                    if one.name in self._engines and records.seconds(one.name, number) is None:
                        self._turn(one, number)
        found = {one.name: records.side(one.name, rounds) for one in self._contenders}
        return {name: side for name, side in found.items() if side is not None}

    def _start(self, one: Contender, stack: contextlib.ExitStack) -> None:
        tell(f"starting {one.name}")
        try:
            engine = stack.enter_context(started(one, self._machine))
            engine.run(warm_up_work(self._machine.data.round(0)))
        except PipemaxError as error:
            self._give_up(one.name, error)
        else:
            self._engines[one.name] = engine

    def _turn(self, one: Contender, number: int) -> None:
        engine = self._engines[one.name]
        others = [other for name, other in self._engines.items() if name != one.name]
        before, idle = [other.cpu_seconds() for other in others], Idle()
        work = self._machine.data.round(number)
        try:
            idle.seconds = engine.run(work)
        except PipemaxError as error:
            self._give_up(one.name, error)
            return
        idle.cpu_s = sum(other.cpu_seconds() for other in others) - sum(before)
        tokens = sum(request.output_tokens for request in work)
        tell(
            f"{time.strftime('%H:%M:%S')}  round {number + 1}  {one.name:<20} "
            f"{idle.seconds:7.2f} s  {tokens / idle.seconds:7.1f} output tokens/s"
            + (f"  ({idle.cores:.2f} cores used by idle ones)" if idle.cores > UNFAIR_CORES else "")
        )
        self._records.add(
            contender=one.name,
            round=number,
            seconds=idle.seconds,
            engine=engine.name,
            start_up_s=engine.start_up_s,
            others_cores=idle.cores,
            about={"contender": asdict(one), **engine.about},
        )

    def _give_up(self, name: str, error: PipemaxError) -> None:
        self._engines.pop(name, None)
        self.failed[name] = str(error)
        tell(f"{name} FAILED: {error}")


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
