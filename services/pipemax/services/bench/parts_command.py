"""`pipemax bench kernels`, `transfers`, `coordinator` and `sampler`: the parts alone, each beside
the machine's measured limit where there is one."""

import gc
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipemax.proto.errors import ConfigError
from pipemax.services.bench.children import Child, children
from pipemax.services.bench.machine import READ_BYTES, used_cores
from pipemax.services.bench.output import surroundings, tell
from pipemax.services.bench.planner import PlannerBench, PlannerLoad
from pipemax.services.bench.sampling_kinds import KINDS
from pipemax.services.bench.transfers import Copies
from pipemax.services.launcher.processes import stage_environment, thread_environment
from pipemax.services.machine import available_memory_bytes

ATTEMPTS = 5
_CHILD = "pipemax.services.bench.parts_child"
_COPIES = "pipemax.services.bench.transfers"
_SECONDS = 0.3
"""Of each attempt."""
_LARGE_ROWS = 512

Task = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Part:
    """One figure."""

    name: str
    value: float
    """Per second."""
    unit: str
    per_unit: float
    """`value` in one `unit`."""
    limit: float | None = None
    """What the machine does at most, in the same turns."""
    limit_name: str = ""

    def __str__(self) -> str:
        text = f"{self.name}: {self.value / self.per_unit:.2f} {self.unit}"
        if self.limit is None:
            return text
        limit = f"{self.limit / self.per_unit:.2f} {self.unit}"
        return f"{text}, {self.value / self.limit:.0%} of the {limit} of {self.limit_name}"

    @property
    def data(self) -> dict[str, Any]:
        share = None if self.limit is None else self.value / self.limit
        return {**asdict(self), "share_of_limit": share}


Report = tuple[list[str], dict[str, Any]]
"""Lines, and the JSON object."""


def _report(parts: Sequence[Part], **more: Any) -> Report:
    data = {"parts": [part.data for part in parts], **more, **surroundings()}
    return [str(part) for part in parts], data


@dataclass(frozen=True, slots=True)
class Shape:
    """Of attention."""

    heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, text: str) -> "Shape":
        """`12/4/64`. Raises ConfigError for anything else."""
        numbers = text.split("/")
        if len(numbers) != 3 or not all(number.isdecimal() and int(number) for number in numbers):
            raise ConfigError(f"--shape {text} is not of the form HEADS/KV_HEADS/HEAD_SIZE")
        heads, kv_heads, head_dim = map(int, numbers)
        if heads % kv_heads:
            raise ConfigError(f"--shape {text}: {heads} is not a multiple of {kv_heads}")
        return cls(heads, kv_heads, head_dim)

    def __str__(self) -> str:
        return f"{self.heads} heads, {self.kv_heads} KV heads of {self.head_dim}"


def kernels(
    dtypes: Sequence[str], shapes: Sequence[Shape], batch: int, shortest: int, longest: int
) -> Report:
    """Attention on one core: of decode beside reading the same memory in order, of a prompt beside
    matrix products."""
    if not (1 <= shortest <= longest and batch >= 1):
        raise ConfigError(
            f"a batch of {batch} with contexts from {shortest} to {longest} makes no sense"
        )
    tasks: dict[str, Task] = {
        "read": {"kind": "read", "num_bytes": READ_BYTES},
    }
    contexts = {"batch": batch, "shortest": shortest, "longest": longest}
    for dtype in dtypes:
        tasks[f"products, {dtype}"] = {
            "kind": "products",
            "dtype": dtype,
            "rows": _LARGE_ROWS,
            "matrices": [(1024, 1024)],
            "layers": 1,
        }
        for shape in shapes:
            of = {"dtype": dtype, **asdict(shape)}
            tasks[f"decode, {dtype}, {shape}"] = {"kind": "decode", **contexts, **of}
            tasks[f"prompt, {dtype}, {shape}"] = {"kind": "prompt", "tokens": longest, **of}
    answers = _in_turns(tasks)
    best = {task: max(map(_rate, found)) for task, found in answers.items()}
    decodes = [answer for name, found in answers.items() if "decode" in name for answer in found]
    read_pool = max(answer["read_bytes_s"] for answer in decodes)
    huge = min(answer["huge_bytes"] / answer["pool_bytes"] for answer in decodes)
    parts = [
        Part(
            f"reading a pool in order ({huge:.0%} of it in huge pages)",
            read_pool,
            "GB/s",
            1e9,
            best["read"],
            "reading malloc's memory",
        )
    ]
    best["read_pool"] = read_pool
    for dtype in dtypes:
        for shape in shapes:
            parts += _attention(best, dtype, shape, f"contexts {shortest} to {longest}", longest)
    return _report(parts, batch=batch, shortest=shortest, longest=longest, huge_pages=huge)


def _attention(
    best: Mapping[str, float], dtype: str, shape: Shape, contexts: str, tokens: int
) -> list[Part]:
    return [
        Part(
            f"decode attention, {dtype}, {shape}, {contexts}",
            best[f"decode, {dtype}, {shape}"],
            "GB/s",
            1e9,
            best["read_pool"],
            "reading the pool in order",
        ),
        Part(
            f"prompt attention, {dtype}, {shape}, {tokens} tokens",
            best[f"prompt, {dtype}, {shape}"],
            "GFLOP/s",
            1e9,
            best[f"products, {dtype}"],
            f"matrix products of {_LARGE_ROWS} rows",
        ),
    ]


def sampler(rows: int, vocab_sizes: Sequence[int], kinds: Sequence[str]) -> Report:
    """Sampling on one core, beside reading the logits once."""
    for kind in kinds:
        if kind not in KINDS:
            raise ConfigError(f"--kind {kind} is not one of {', '.join(KINDS)}")
    tasks: dict[str, Task] = {"read": {"kind": "read", "num_bytes": READ_BYTES}}
    for vocab in vocab_sizes:
        for kind in kinds:
            tasks[f"{kind}, vocabulary {vocab}"] = {
                "kind": "sampler",
                "rows": rows,
                "vocab": vocab,
                "sampling": KINDS[kind],
            }
    best = {task: max(map(_rate, found)) for task, found in _in_turns(tasks).items()}
    read = best.pop("read")
    name = "reading each token's logits once"
    token_bytes = {task: 4 * tasks[task]["vocab"] for task in best}
    return _report(
        [
            Part(kind, value / token_bytes[kind], "tokens/s", 1, read / token_bytes[kind], name)
            for kind, value in best.items()
        ],
        rows=rows,
    )


def transfers(block_bytes: int, num_blocks: int) -> Report:
    """The daemon's copies between pools in memory, beside one large copy."""
    needed, there = 4 * block_bytes * num_blocks, available_memory_bytes()
    if needed > there:
        raise ConfigError(f"{needed} bytes needed, {there} available: give fewer or smaller blocks")
    tell(f"copying {num_blocks} blocks of {block_bytes} bytes")
    argv = [sys.executable, "-P", "-m", _COPIES]
    with children(Child("measuring copies", argv, thread_environment(1))) as (child,):
        found = Copies(**child.ask({"block_bytes": block_bytes, "num_blocks": num_blocks}))
    large, malloc = found.large_bytes_s, found.malloc_bytes_s
    parts = [Part("one large copy between pools", large, "GB/s", 1e9, malloc, "malloc's memory")]
    for way, value in found.by_way.items():
        parts.append(Part(way, value, "GB/s", 1e9, large, "one large copy"))
    return _report(parts, block_bytes=block_bytes, num_blocks=num_blocks)


def coordinator(load: PlannerLoad, steps: int) -> Report:
    """Planning alone, with perfect stages. There is no limit but none at all."""
    bench = PlannerBench(load)
    tell(f"waiting until {load.requests} requests run")
    bench.warm_up()
    gc.collect()
    tell(f"measuring {steps} steps")
    for _ in range(steps):
        bench.turn()
    lines, events = [], {}
    for kind, seconds in sorted(bench.seconds.items()):
        events[kind] = {"per_step": len(seconds) / steps, **_spread(seconds)}
        lines.append(
            f"{kind:24} {len(seconds) / steps:8.2f} per step, "
            f"{1e6 * statistics.mean(seconds):8.1f} µs each"
        )
    step = _spread(bench.step_s)
    running, waiting = len(bench.scheduler.state.running), len(bench.scheduler.state.waiting)
    lines.append(
        f"a step, {running} running and {waiting} waiting, {load.stages} stages: "
        f"median {1e3 * step['median_s']:.2f} ms, 99th percentile {1e3 * step['p99_s']:.2f} ms"
    )
    data = {
        "step": step,
        "events": events,
        "running": running,
        "waiting": waiting,
        "load": asdict(load),
        **surroundings(),
    }
    return lines, data


def _spread(seconds: Sequence[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {
        "mean_s": statistics.mean(ordered),
        "median_s": statistics.median(ordered),
        "p99_s": ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)],
    }


def _in_turns(tasks: Mapping[str, Task]) -> dict[str, list[Any]]:
    """What each task answers, on one core, in attempts in which all take turns."""
    (core,) = used_cores(1)
    argv = [sys.executable, "-P", "-m", _CHILD, str(core)]
    answers: dict[str, list[Any]] = {name: [] for name in tasks}
    with children(Child("measuring kernels", argv, stage_environment(1, "cpu"))) as (child,):
        for attempt in range(1, ATTEMPTS + 1):
            tell(f"attempt {attempt} of {ATTEMPTS}")
            for name, task in tasks.items():
                answers[name].append(child.ask({**task, "seconds": _SECONDS}))
    return answers


def _rate(answer: Any) -> float:
    """Bytes or FLOP per second."""
    if isinstance(answer, dict):
        done = answer["flop"] if "flop" in answer else answer["bytes"]
        return float(done) / float(answer["seconds"])
    return float(answer)
