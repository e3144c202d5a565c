"""One core's rates: `python -m pipemax.services.bench.cores_child CORE`, tasks in, results out, one
JSON object a line. A process of its own, as the command line never imports torch."""

import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import linear

from pipemax.stage_worker.model.products import TiledMatrix, can_tile, fits_panels

_FIRST_S = 0.02
"""Untimed, before each measurement."""
_WEIGHTS_BYTES = 256 * 2**20
"""More than a cache holds: layers of a model are measured until they are as large together."""

Layer = list[torch.Tensor]
"""Matrices, `[outputs, inputs]`."""
Product = Callable[[torch.Tensor], torch.Tensor]
"""Of rows `[rows, inputs]` with one matrix."""
Products = list[list[Product]]
"""By layer and matrix."""


class Model(NamedTuple):
    """What is multiplied by."""

    shapes: tuple[tuple[int, int], ...]
    """Of each layer's matrices."""
    dtype: torch.dtype
    num_layers: int


def products_flop_s(task: dict[str, Any]) -> float:
    """FLOP/s of `task["rows"]` rows times each of a layer's matrices, `[outputs, inputs]`, one
    after the other; layer after layer, as many as the model has, so that weights come from memory
    where they do so in the model. With weights as they are, as oneDNN packs them for so many rows,
    and as our own products have them: the fastest counts."""
    dtype, rows = getattr(torch, task["dtype"]), task["rows"]
    shapes = tuple((outputs, inputs) for outputs, inputs in task["matrices"])
    model = Model(shapes, dtype, task["layers"])
    inputs = [torch.randn(rows, width).to(dtype) for _, width in shapes]
    flop = 2 * rows * sum(math.prod(shape) for shape in shapes)
    with torch.inference_mode():
        ways = (plain_products(model), packed_products(model, rows), tiled_products(model))
        calls = [layer_after_layer(products, inputs) for products in ways if products]
        return float(flop / min(mean_s(once, task["seconds"]) for once in calls))


@lru_cache(maxsize=1)
def made_layers(model: Model) -> list[Layer]:
    """Random ones, as many as the model has, or more than a cache holds."""
    layer_bytes = model.dtype.itemsize * sum(math.prod(shape) for shape in model.shapes)
    count = min(model.num_layers, math.ceil(_WEIGHTS_BYTES / layer_bytes))
    return [[torch.randn(*shape).to(model.dtype) for shape in model.shapes] for _ in range(count)]


def plain_products(model: Model) -> Products:
    return [[partial(linear, weight=matrix) for matrix in layer] for layer in made_layers(model)]


@lru_cache(maxsize=1)
def packed_products(model: Model, rows: int) -> Products:
    """oneDNN's; none where torch has no oneDNN, or oneDNN not this dtype."""
    try:
        pack = torch.ops.mkldnn._reorder_linear_weight
        return [
            [partial(_packed_linear, pack(matrix, rows)) for matrix in layer]
            for layer in made_layers(model)
        ]
    except (AttributeError, RuntimeError):
        return []


def _packed_linear(matrix: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(rows, matrix, None, "none", [], "")  # type: ignore[no-any-return]


@lru_cache(maxsize=1)
def tiled_products(model: Model) -> Products:
    """Ours; none where a CPU stage has others."""
    layers = made_layers(model)
    if not can_tile(model.dtype) or not all(map(fits_panels, layers[0])):
        return []
    return [[TiledMatrix(matrix) for matrix in layer] for layer in layers]


def layer_after_layer(layers: Products, inputs: Sequence[torch.Tensor]) -> Callable[[], None]:
    """What multiplies by the next layer when it is called; `inputs`: rows for each matrix."""
    turn = itertools.cycle(layers)

    def once() -> None:
        for product, rows in zip(next(turn), inputs, strict=True):
            product(rows)

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
