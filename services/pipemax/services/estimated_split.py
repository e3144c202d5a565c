"""`--layer-split estimated`, the default on the CPU: layers are shared out by arithmetic, as
measuring them takes longer than a small model's work.

On a CPU both a layer and the head are matrix products in steps of many rows, so their times go by
their weights; that a layer also reads KV makes the head cheaper beside it. The head computes a row
for each token that is sampled, the layers one for each token of the prompt as well: with a large
vocabulary the last stage gets fewer layers for its head, but never as many fewer as decoding alone
would give it. Where layers are fused, the last one computes queries, keys and values of a prompt,
and the rest for what is sampled. What is left out (norms, sampling, Python) is small beside either.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from pipemax.proto.config import EngineConfig
from pipemax.proto.errors import ConfigError
from pipemax.proto.geometry import DTYPE_BYTES, Dtype, split_layers
from pipemax.services.config_limits import dtype_of
from pipemax.services.layer_split import StageRoom, choose_split, describe
from pipemax.services.measured_split import load_of
from pipemax.stage_worker.layer_costs import ModelCosts, PartCost
from pipemax.stage_worker.model.families import supported_family
from pipemax.stage_worker.model.inspect import CONFIG_FILE, ModelInfo, read_config
from pipemax.stage_worker.modelled.catalogue import model_from_config

_FLOP_S: Final[dict[Dtype, float]] = {"bfloat16": 200e9, "float16": 100e9, "float32": 100e9}
"""Of one thread in large products, about: measured on a core with AVX-512 and no AMX. Only its
ratio to the next counts."""
_READ_BYTES_S: Final = 10e9
"""At which one thread reads KV, about."""
_LEAST_GAIN: Final = 0.03
"""An even split is kept unless another is expected to serve so much more: nothing was measured."""


def estimated_split(
    config: EngineConfig, info: ModelInfo, asked_len: int | None, notice: Callable[[str], None]
) -> tuple[int, ...]:
    """Layers by stage. config: all of it but the split and what follows from it. asked_len:
    `--max-model-len`. Raises ModelError for a config.json whose shape cannot be read."""
    stages = config.pipeline_parallel_size
    even = split_layers(info.num_layers, stages)
    dtype = dtype_of(config, info)
    costs = [estimated_costs(Path(config.model), info, dtype, fused_layers=config.fused_layers)]
    rooms = [StageRoom(None, config.pool_bytes)] * stages
    token_bytes = info.kv_geometry(1, 1, dtype).token_bytes
    load = load_of(config, info, asked_len)
    try:
        found = choose_split(costs * stages, rooms, token_bytes, load)
    except ConfigError:
        return even  # no pool is large enough, which is said elsewhere, by its flag
    plain = describe(even, costs * stages, rooms, token_bytes, load)
    if plain is None or max(found.request_s) * (1 + _LEAST_GAIN) > max(plain.request_s):
        return even
    shares = ",".join(map(str, found.layers))
    gain = max(plain.request_s) / max(found.request_s) - 1
    notice(
        f"layer split {shares}: estimated, as head and last layer cost other time than a layer; "
        f"evenly (--layer-split even) {gain:.0%} fewer requests would be served"
    )
    return found.layers


def estimated_costs(
    model_dir: Path, info: ModelInfo, dtype: Dtype, *, fused_layers: bool
) -> ModelCosts:
    """Of one thread, which is as good as of any number: all parts share the threads alike.
    `fused_layers`: of families that can be."""
    shape = model_from_config(model_dir / CONFIG_FILE)
    head = info.vocab_size * info.hidden_size
    config = read_config(model_dir)
    tied = config.get("text_config", config).get("tie_word_embeddings")
    tables = head if tied else 2 * head  # as they are counted in the shape
    layer = (shape.active_parameters - tables) / info.num_layers
    held = (shape.parameters - tables) / info.num_layers
    token_bytes = info.kv_geometry(1, 1, dtype).token_bytes
    row_s = 2 / _FLOP_S[dtype]
    element = DTYPE_BYTES[dtype]
    layer_cost = PartCost(
        request_s=layer * row_s, context_s=token_bytes / _READ_BYTES_S, prompt_s=layer * row_s
    )
    last_cost = layer_cost
    if fused_layers and supported_family(config).can_fuse(config.get("hidden_act")):
        attended = shape.hidden_size * info.head_dim * (shape.num_heads + 2 * shape.num_kv_heads)
        last_cost = msgspec.structs.replace(layer_cost, prompt_s=attended * row_s)
    return ModelCosts(
        layers=(*(layer_cost,) * (info.num_layers - 1), last_cost),
        layer_bytes=(round(element * held),) * info.num_layers,
        embedding=PartCost(),
        embedding_bytes=element * head,
        head=PartCost(request_s=head * row_s),
        head_bytes=element * head,
        step=PartCost(),
    )
