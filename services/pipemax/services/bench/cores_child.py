"""One core's rates: `python -m pipemax.services.bench.cores_child CORE`, tasks in, results out, one
JSON object a line. A process of its own, as the command line never imports torch."""

import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import linear

_FIRST_S = 0.02
"""Untimed, before each measurement."""
_WEIGHTS_BYTES = 256 * 2**20
"""More than a cache holds: layers of a model are measured until they are as large together."""

Layer = list[torch.Tensor]
"""Matrices, `[outputs, inputs]`."""
Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Of rows `[rows, inputs]` and a matrix."""


class Model(NamedTuple):
    """What is multiplied by."""

    shapes: tuple[tuple[int, int], ...]
    """Of each layer's matrices."""
    dtype: torch.dtype
    num_layers: int


def products_flop_s(task: dict[str, Any]) -> float:
    """FLOP/s of `task["rows"]` rows times each of a layer's matrices, `[outputs, inputs]`, one
    after the other; layer after layer, as many as the model has, so that weights come from memory
    where they do so in the model. With weights as they are, and as oneDNN packs them for so many
    rows: the faster counts."""
    dtype, rows = getattr(torch, task["dtype"]), task["rows"]
    shapes = tuple((outputs, inputs) for outputs, inputs in task["matrices"])
    model = Model(shapes, dtype, task["layers"])
    inputs = {width: torch.randn(rows, width).to(dtype) for _, width in shapes}
    flop = 2 * rows * sum(math.prod(shape) for shape in shapes)
    ways: list[tuple[list[Layer], Product]] = [(made_layers(model), linear)]
    with torch.inference_mode():
        if packed := packed_layers(model, rows):
            ways.append((packed, packed_linear))
        calls = [layer_after_layer(layers, inputs, product) for layers, product in ways]
        return float(flop / min(mean_s(once, task["seconds"]) for once in calls))


@lru_cache(maxsize=1)
def made_layers(model: Model) -> list[Layer]:
    """Random ones, as many as the model has, or more than a cache holds."""
    layer_bytes = model.dtype.itemsize * sum(math.prod(shape) for shape in model.shapes)
    count = min(model.num_layers, math.ceil(_WEIGHTS_BYTES / layer_bytes))
    return [[torch.randn(*shape).to(model.dtype) for shape in model.shapes] for _ in range(count)]


@lru_cache(maxsize=1)
def packed_layers(model: Model, rows: int) -> list[Layer]:
    """As oneDNN packs them; none where torch has no oneDNN, or oneDNN not this dtype."""
    try:
        pack = torch.ops.mkldnn._reorder_linear_weight
        return [[pack(matrix, rows) for matrix in layer] for layer in made_layers(model)]
    except (AttributeError, RuntimeError):
        return []


def packed_linear(rows: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(rows, matrix, None, "none", [], "")  # type: ignore[no-any-return]


def layer_after_layer(
    layers: list[Layer], inputs: Mapping[int, torch.Tensor], product: Product
) -> Callable[[], None]:
    """What multiplies by the next layer when it is called."""
    turn = itertools.cycle(layers)
    widths = [matrix.shape[1] for matrix in layers[0]]

    def once() -> None:
        for width, matrix in zip(widths, next(turn), strict=True):
            product(inputs[width], matrix)

    return once


@numba.njit(nogil=True)  # type: ignore[untyped-decorator]
def add_up(values: npt.NDArray[np.int64]) -> int:
    """Reads all of them, in order."""
    total = 0
    for index in range(values.size):
        total += values[index]
    return total


def read_bytes_s(task: dict[str, Any]) -> float:
    """Bytes per second read from memory, in order."""
    values = np.ones(task["num_bytes"] // 8, np.int64)
    return float(values.nbytes / mean_s(lambda: add_up(values), task["seconds"]))


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
