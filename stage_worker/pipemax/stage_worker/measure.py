"""Measures what the parts of a model cost on one device: `python -m pipemax.stage_worker.measure`,
an EngineConfig as JSON in, ModelCosts as JSON out. A process of its own, as the launcher must
neither import torch nor open a GPU.

Engines of a few layers with random weights run the warm-up sweep of a real stage, so whatever the
device does for a stage, it does here. A single layer's time has what any step costs in it, apart
from the layer. That is found by adding layers: with T(a, b) the time of a stage of the layers
[a, b), of which layer 0 comes with the embedding and the last with the head,

    layers 1 to n-1      T(0, n) − T(0, 1)
    any step, each time  T(k, k+1) less layer k, on average over them
    embedding            T(0, 1) less step and layer 0
    head                 T(last) less step and the last layer
"""

import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt

from pipemax.proto.config import EngineConfig
from pipemax.proto.errors import PipemaxError
from pipemax.proto.geometry import BlockGeometry, Dtype, blocks_for
from pipemax.proto.messages.control import SweepSample
from pipemax.stage_worker.engine import StageEngine, open_engine
from pipemax.stage_worker.layer_costs import ModelCosts, PartCost
from pipemax.stage_worker.model.inspect import ModelInfo, inspect_model
from pipemax.stage_worker.model.parts import ModelParts, model_parts

EXIT_REFUSED: Final = 2
_RUN_LAYERS: Final = 4
"""Layers of the longest stage that is measured."""
_SWEEP_S: Final = 1.0
"""For each stage."""
_CONTEXT_TOKENS: Final = 512
"""Of each request in the largest batch."""
_LONGEST_TOKENS: Final = 2048
"""A longer context only makes measuring longer: its cost is taken to be proportional."""

_POOL_BYTES: Final = 2 * 2**30
"""Most that a pool takes, as good as; then contexts are shorter."""

Shape = tuple[int, int, int, int]
"""A SweepSample but for its time."""
Times = Mapping[Shape, float]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Part:
    """The layers [first, end) of the model, as a stage."""

    first: int
    end: int


def parts_to_measure(kinds: Sequence[int]) -> tuple[Part, ...]:
    """First the stages of layer 0, of some more, and of the last; then one of a single layer of
    each kind that stands between them. For three layers or more."""
    last = len(kinds) - 1
    run = min(_RUN_LAYERS, last)
    singles = sorted({kinds.index(kind, 1) for kind in set(kinds[1:last])})
    return (Part(0, 1), Part(0, run), Part(last, last + 1), *(Part(n, n + 1) for n in singles))


def costs_of(times: Mapping[Part, Times], parts: ModelParts) -> ModelCosts:
    """`times`: of `parts_to_measure`."""
    kinds, last = parts.kinds, len(parts.kinds) - 1
    shapes = set.intersection(*(set(found) for found in times.values()))
    run = min(_RUN_LAYERS, last)
    single = {kinds[part.first]: times[part] for part in parts_to_measure(kinds)[3:]}
    first, longer, end = times[Part(0, 1)], times[Part(0, run)], times[Part(last, last + 1)]
    step: dict[Shape, float] = {}
    for shape in shapes:
        apart = sum(single[kind][shape] for kind in kinds[1:run])
        step[shape] = max(0.0, (apart - (longer[shape] - first[shape])) / (run - 1))
    layer = {
        kind: {shape: found[shape] - step[shape] for shape in shapes}
        for kind, found in single.items()
    }
    # A kind that only stands at an end cannot be told from what it comes with, and never need be.
    layer.setdefault(kinds[0], {shape: first[shape] - step[shape] for shape in shapes})
    layer.setdefault(kinds[last], {shape: end[shape] - step[shape] for shape in shapes})

    def rest(found: Times, kind: int) -> PartCost:
        return fit({s: found[s] - step[s] - layer[kind][s] for s in shapes})

    cost = {kind: fit(found) for kind, found in layer.items()}
    return ModelCosts(
        layers=tuple(cost[kind] for kind in kinds),
        layer_bytes=parts.layer_bytes,
        embedding=rest(first, kinds[0]),
        embedding_bytes=parts.embedding_bytes,
        head=rest(end, kinds[last]),
        head_bytes=parts.head_bytes,
        step=fit(step),
    )


def fit(times: Times) -> PartCost:
    """Least squares over decode steps, with no negative coefficient; the longest chunk of a prompt
    without context, or where the device is too slow for any, what a request costs."""
    decode = [(shape, seconds) for shape, seconds in times.items() if shape[0]]
    chunks = [(shape, seconds) for shape, seconds in times.items() if shape[2]]
    rows = np.array([(1.0, shape[0], shape[1]) for shape, _ in decode])
    fixed_s, request_s, context_s = _not_negative(rows, np.array([s for _, s in decode]))
    prompt_s = request_s
    if chunks:
        shape, chunk_s = max(chunks, key=lambda found: (found[0][2], -found[0][3]))
        prompt_s = max(0.0, chunk_s / shape[2])
    return PartCost(fixed_s=fixed_s, request_s=request_s, context_s=context_s, prompt_s=prompt_s)


def _not_negative(
    rows: "np.typing.NDArray[np.float64]", seconds: "np.typing.NDArray[np.float64]"
) -> list[float]:
    """Of all subsets of columns, the one that fits best with no negative coefficient."""
    columns = range(rows.shape[1])
    best = [0.0] * len(columns)
    least = float(seconds @ seconds)
    for size in range(1, len(columns) + 1):
        for chosen in combinations(columns, size):
            found, *_ = np.linalg.lstsq(rows[:, chosen], seconds, rcond=None)
            error = seconds - rows[:, chosen] @ found
            if found.min() >= 0 and (squares := float(error @ error)) < least:
                least = squares
                values = dict(zip(chosen, map(float, found), strict=True))
                best = [values.get(column, 0.0) for column in columns]
    return best


def measure(
    config: EngineConfig, open_engine: Callable[[EngineConfig, int], StageEngine] = open_engine
) -> ModelCosts:
    """Costs of the model of `config` on its first stage's device. Weights are random, whatever the
    folder holds, and there is no host pool."""
    folder = Path(config.model)
    info = inspect_model(folder, config.load_format)
    dtype: Dtype = info.dtype if config.dtype == "auto" else config.dtype
    parts = model_parts(folder, dtype)
    times = {}
    for part in parts_to_measure(parts.kinds):
        part_config, stage = config_of(config, part, info)
        engine = open_engine(part_config, stage)
        try:
            times[part] = times_of(engine.sweep(_SWEEP_S))
        finally:
            engine.close()
    return costs_of(times, parts)


def times_of(samples: Iterable[SweepSample]) -> Times:
    return {
        (
            sample.decode_requests,
            sample.context_tokens,
            sample.prefill_tokens,
            sample.prefill_pairs,
        ): sample.compute_s
        for sample in samples
    }


def config_of(config: EngineConfig, part: Part, info: ModelInfo) -> tuple[EngineConfig, int]:
    """A configuration one of whose stages is `part`, with a pool of as many blocks for every part,
    and the index of that stage."""
    around = (part.first, part.end - part.first, info.num_layers - part.end)
    split = tuple(layers for layers in around if layers)
    stage = 1 if part.first else 0
    longest = min(config.max_model_len, _LONGEST_TOKENS)
    each = blocks_for(min(longest, _CONTEXT_TOKENS), config.block_size)
    dtype: Dtype = info.dtype if config.dtype == "auto" else config.dtype
    largest = BlockGeometry(
        _RUN_LAYERS, config.block_size, info.num_kv_heads, info.head_dim, dtype
    ).block_bytes
    num_blocks = max(
        min(config.max_num_seqs * each, _POOL_BYTES // largest),
        blocks_for(longest, config.block_size),
    )
    block_bytes = tuple(
        BlockGeometry(
            layers, config.block_size, info.num_kv_heads, info.head_dim, dtype
        ).block_bytes
        for layers in split
    )
    cuda = config.cuda and msgspec.structs.replace(
        config.cuda,
        gpus=(config.cuda.gpus[0],) * len(split),
        names=(),
        block_bytes=block_bytes,
        kv_copies="stage",  # there is no daemon
    )
    changed = msgspec.structs.replace(
        config,
        load_format="dummy",
        pipeline_parallel_size=len(split),
        layer_split=split,
        cuda=cuda,
        max_model_len=longest,
        kv_cache_memory_bytes=num_blocks * block_bytes[stage],
        kv_offloading_bytes=0,
    )
    return changed, stage


def main() -> int:
    """Only the result goes to standard output: libraries may print what they like."""
    result = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    try:
        costs = measure(msgspec.json.decode(sys.stdin.buffer.read(), type=EngineConfig))
    except PipemaxError as error:
        sys.stderr.write(" ".join(str(error).split()) + "\n")
        return EXIT_REFUSED
    with result:
        result.write(msgspec.json.encode(costs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
