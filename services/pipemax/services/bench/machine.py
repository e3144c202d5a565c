"""Measures what the machine can do at most: matrix products and reading memory, one core and all.

Each core has a process of its own that is bound to it and computes with one thread; "all" is what
they do at the same time. Of several attempts the fastest counts: what else runs on a machine only
ever slows it.
"""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipemax.proto.geometry import Dtype
from pipemax.services.bench.children import Child, children
from pipemax.services.bench.limit import MachineRates
from pipemax.services.launcher.processes import stage_environment

ROWS = (1, 8, 32, 128, 512, 2048)
READ_BYTES = 256 * 2**20
"""Of each core: more than any cache holds."""
_CHILD = "pipemax.services.bench.cores_child"
_ATTEMPTS = 5
_SECONDS = 0.2
"""Of each attempt."""

Matrices = Sequence[tuple[int, int]]
"""`(outputs, inputs)` of each matrix of a layer."""


@dataclass(frozen=True, slots=True)
class Rate:
    """Per second."""

    one_core: float
    all_cores: float


@dataclass(frozen=True, slots=True)
class Machine:
    """What was measured."""

    cores: tuple[int, ...]
    """By number, as the kernel counts them."""
    products_flop_s: Mapping[str, Mapping[int, Rate]]
    """By dtype and rows."""
    read_bytes_s: Rate

    def rates(self, dtype: str) -> MachineRates:
        """Of all cores together."""
        rows = self.products_flop_s[dtype]
        return MachineRates(
            {count: rate.all_cores for count, rate in rows.items()}, self.read_bytes_s.all_cores
        )


def used_cores(count: int) -> tuple[int, ...]:
    """The first so many of those that this process may run on."""
    return tuple(sorted(os.sched_getaffinity(0))[:count])


def measure_machine(
    cores: Sequence[int],
    dtypes: Sequence[Dtype],
    matrices: Matrices,
    notice: Callable[[str], None],
    *,
    rows: Sequence[int] = ROWS,
    read_bytes: int = READ_BYTES,
    seconds: float = _SECONDS,
    num_layers: int = 1,
) -> Machine:
    """`matrices`: of each of the model's `num_layers`, of which as many are measured as no cache
    holds. `notice` is told what comes next. Raises PipemaxSystemError when a process fails."""
    with children(*(_start(core) for core in cores)) as workers:
        notice(f"measuring how fast {len(cores)} cores read memory")
        read = _rate(workers, {"kind": "read", "num_bytes": read_bytes, "seconds": seconds})
        products: dict[str, dict[int, Rate]] = {}
        for dtype in dtypes:
            notice(f"measuring matrix products in {dtype}")
            task = {
                "kind": "products",
                "dtype": dtype,
                "matrices": matrices,
                "layers": num_layers,
                "seconds": seconds,
            }
            products[dtype] = {count: _rate(workers, {**task, "rows": count}) for count in rows}
        return Machine(tuple(cores), products, read)


def _start(core: int) -> Child:
    argv = [sys.executable, "-P", "-m", _CHILD, str(core)]
    return Child(f"measuring core {core}", argv, stage_environment(1, "cpu"))


def _rate(workers: Sequence[Child], task: dict[str, Any]) -> Rate:
    return Rate(_together(workers[:1], task), _together(workers, task))


def _together(workers: Sequence[Child], task: dict[str, Any]) -> float:
    attempts = []
    for _ in range(_ATTEMPTS):
        for worker in workers:
            worker.tell(task)
        attempts.append(sum(float(worker.answer()) for worker in workers))
    return max(attempts)
