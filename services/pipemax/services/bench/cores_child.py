"""One core's rates: `python -m pipemax.services.bench.cores_child CORE`, tasks in, results out, one
JSON object a line. A process of its own, as the command line never imports torch."""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import linear

_FIRST_S = 0.02
"""Untimed, before each measurement."""


def products_flop_s(task: dict[str, Any]) -> float:
    """FLOP/s of `task["rows"]` rows times each of the matrices, `[outputs, inputs]` and made up,
    one after the other as a layer has them."""
    dtype = getattr(torch, task["dtype"])
    weights = [torch.randn(*shape).to(dtype) for shape in task["matrices"]]
    inputs = {
        width: torch.randn(task["rows"], width).to(dtype)
        for width in {weight.shape[1] for weight in weights}
    }
    flop = 2 * task["rows"] * sum(weight.numel() for weight in weights)

    def once() -> None:
        for weight in weights:
            linear(inputs[weight.shape[1]], weight)

    with torch.inference_mode():
        return float(flop / mean_s(once, task["seconds"]))


@numba.njit(nogil=True)  # type: ignore[untyped-decorator]
def _add_up(values: npt.NDArray[np.int64]) -> int:
    total = 0
    for index in range(values.size):
        total += values[index]
    return total


def read_bytes_s(task: dict[str, Any]) -> float:
    """Bytes per second read from memory, in order."""
    values = np.ones(task["num_bytes"] // 8, np.int64)
    return float(values.nbytes / mean_s(lambda: _add_up(values), task["seconds"]))


def mean_s(once: Callable[[], object], at_least_s: float) -> float:
    """Seconds of a call, on average over calls of `at_least_s` together."""
    _repeat(once, min(_FIRST_S, at_least_s))
    calls, seconds = _repeat(once, at_least_s)
    return seconds / calls


def _repeat(once: Callable[[], object], at_least_s: float) -> tuple[int, float]:
    started, calls = time.perf_counter(), 0
    while True:
        once()
        calls += 1
        seconds = time.perf_counter() - started
        if seconds >= at_least_s:
            return calls, seconds


Tasks = Mapping[str, Callable[[dict[str, Any]], object]]
TASKS: Tasks = {"products": products_flop_s, "read": read_bytes_s}


def serve(tasks: Tasks, core: int) -> None:
    """Answers tasks, by their `kind`, bound to the core. Only results go to standard output."""
    results = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    with results:
        for line in sys.stdin:
            task = json.loads(line)
            results.write(json.dumps(tasks[task["kind"]](task)) + "\n")
            results.flush()


if __name__ == "__main__":
    serve(TASKS, int(sys.argv[1]))
