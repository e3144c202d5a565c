"""What each process of a system holds in memory while it works, beside what it may."""

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from contenders import BLOCK_SIZE, Contender, Machine, started, tell

from pipemax.proto.config import EngineConfig
from pipemax.proto.geometry import DTYPE_BYTES, BlockGeometry
from pipemax.proto.sizes import format_size
from pipemax.services.bench.engines import OurEngine, warm_up_work
from pipemax.services.bench.model_cost import cost_of, dtype_of
from pipemax.services.bench.processes import Memory, memory_of
from pipemax.stage_worker.model.inspect import inspect_model, read_config

STAGE_SPARE_BYTES = 500_000_000
SERVICE_BYTES = 200_000_000
_EVERY_S = 0.5
_LAUNCHER = "launcher"
"""This process: client and launcher in one. It has no goal."""


@dataclass(slots=True)
class Peak:
    """Of one process, the most seen."""

    resident_bytes: int = 0
    private_bytes: int = 0
    ever_bytes: int = 0
    """By the kernel's account, since its start."""

    def see(self, memory: Memory) -> None:
        self.resident_bytes = max(self.resident_bytes, memory.resident_bytes)
        self.private_bytes = max(self.private_bytes, memory.private_bytes)
        self.ever_bytes = max(self.ever_bytes, memory.peak_bytes)


class Watch:
    """Looks at an engine's processes while the block runs."""

    def __init__(self, engine: OurEngine) -> None:
        self._engine = engine
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self.peaks: dict[str, Peak] = {}

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._done.wait(_EVERY_S):
            for name, pid in {**self._engine.pids(), _LAUNCHER: os.getpid()}.items():
                try:
                    memory = memory_of(pid)
                except OSError:
                    continue
                self.peaks.setdefault(name, Peak()).see(memory)


def memory_line(contenders: Sequence[Contender], machine: Machine) -> dict[str, Any]:
    """One round of each contender, one after the other."""
    work = machine.data.round(0)
    processes: list[dict[str, Any]] = []
    for one in contenders:
        tell(f"starting {one.name}")
        with started(one, machine) as engine:
            assert isinstance(engine, OurEngine)
            engine.run(warm_up_work(work))
            with Watch(engine) as watch:
                engine.run(work)
            allowed = allowed_bytes(engine.config, machine)
        processes += [
            judged(one.name, name, peak, allowed.get(name))
            for name, peak in sorted(watch.peaks.items())
        ]
    missed = [one for one in processes if one["met"] is False]
    return {
        "lines": ["memory"],
        "processes": processes,
        "texts": [text(one) for one in processes]
        + [f"memory: {'MISSED by ' + str(len(missed)) if missed else 'met'}"],
        "comparisons": [],
    }


@dataclass(frozen=True, slots=True)
class Allowed:
    """What a process may hold."""

    total_bytes: int
    with_pools: bool
    """Shared memory counts: of stages, whose pool is among the total."""
    weights_bytes: int = 0
    pool_bytes: int = 0


def allowed_bytes(config: EngineConfig, machine: Machine) -> dict[str, Allowed]:
    """By process: of a stage its weights, its pool and STAGE_SPARE_BYTES, since its start; of
    coordinator and daemon SERVICE_BYTES without shared memory."""
    info = inspect_model(machine.model, "dummy")
    dtype = dtype_of(machine.dtype, info)
    cost, _ = cost_of(machine.model, info, dtype, machine.data.round(0))
    element = DTYPE_BYTES[dtype]
    head = int(cost.head_parameters) * element
    layer = int(cost.layer_parameters) // info.num_layers * element
    last = len(config.layer_split) - 1
    tied = bool(read_config(machine.model).get("tie_word_embeddings"))
    found = {}
    for index, layers in enumerate(config.layer_split):
        tables = (index == 0) + (index == last) - (tied and last == 0)
        weights = layers * layer + tables * head
        block = BlockGeometry(layers, BLOCK_SIZE, info.num_kv_heads, info.head_dim, dtype)
        pool = config.pool_bytes // block.block_bytes * block.block_bytes
        total = weights + pool + STAGE_SPARE_BYTES
        found[f"stage-{index}"] = Allowed(total, True, weights, pool)
    return found | dict.fromkeys(("coordinator", "kv-daemon"), Allowed(SERVICE_BYTES, False))


def judged(contender: str, name: str, peak: Peak, allowed: Allowed | None) -> dict[str, Any]:
    used = peak.ever_bytes if allowed is None or allowed.with_pools else peak.private_bytes
    return {
        "contender": contender,
        "process": name,
        "used_bytes": used,
        "resident_bytes": peak.resident_bytes,
        "private_bytes": peak.private_bytes,
        "ever_bytes": peak.ever_bytes,
        "allowed_bytes": None if allowed is None else allowed.total_bytes,
        "weights_bytes": None if allowed is None else allowed.weights_bytes,
        "pool_bytes": None if allowed is None else allowed.pool_bytes,
        "met": None if allowed is None else used <= allowed.total_bytes,
    }


def text(one: dict[str, Any]) -> str:
    line = (
        f"{one['contender']:<16} {one['process']:<12} {format_size(one['used_bytes']):>9} at most "
        f"(while it worked {format_size(one['resident_bytes'])}, "
        f"{format_size(one['private_bytes'])} of it not shared)"
    )
    if one["allowed_bytes"] is None:
        return line
    return f"{line}; allowed {format_size(one['allowed_bytes'])}: " + (
        "met" if one["met"] else "MISSED"
    )
