"""What a token of a model costs, from its config.json."""

import typing
from pathlib import Path

from pipemax.proto.errors import ConfigError
from pipemax.proto.geometry import DTYPE_BYTES, Dtype
from pipemax.services.bench.limit import DecoderCost
from pipemax.services.bench.machine import Matrices
from pipemax.services.bench.work import Work
from pipemax.stage_worker.model.inspect import ModelInfo, inspect_model, read_config
from pipemax.stage_worker.modelled.catalogue import model_from_config

_TWO_MATRICES = ("GPTNeoXForCausalLM",)
"""Families whose feed-forward is not gated."""


def dtype_of(asked: str, info: ModelInfo) -> Dtype:
    known = typing.get_args(Dtype)
    if asked != "auto" and asked not in known:
        raise ConfigError(f"--dtype {asked} is not one of auto, {', '.join(known)}")
    return info.dtype if asked == "auto" else typing.cast(Dtype, asked)


def kv_token_bytes(folder: Path, dtype: str) -> int:
    """Of a token's keys and values in all layers. `dtype`: as asked for, auto is the model's."""
    info = inspect_model(folder, "dummy")
    element = DTYPE_BYTES[dtype_of(dtype, info)]
    return 2 * info.num_layers * info.num_kv_heads * info.head_dim * element


def cost_of(
    folder: Path, info: ModelInfo, dtype: Dtype, work: Work
) -> tuple[DecoderCost, Matrices]:
    """What a token costs, and a layer's matrices, of which those with the same input are one, as
    engines have them. Raises ConfigError for a model to which the formula does not apply."""
    config = read_config(folder)
    shape = model_from_config(folder / "config.json")
    if shape.num_experts > 1:
        raise ConfigError(
            f"{info.architecture} is a mixture of experts: its limit depends on which experts "
            "tokens choose, and is not implemented; use a dense model"
        )
    if info.architecture in _TWO_MATRICES:
        raise ConfigError(f"the limit of {info.architecture}, whose MLP is not gated, is not known")
    window, longest = config.get("sliding_window"), max(one.total_tokens for one in work)
    if config.get("use_sliding_window", True) and isinstance(window, int) and window < longest:
        raise ConfigError(
            f"requests of {longest} tokens do not fit the model's sliding window of {window}, "
            "which the formula does not know: take shorter ones"
        )
    hidden, head = shape.hidden_size, info.vocab_size * shape.hidden_size
    embedding = 0 if config.get("tie_word_embeddings") else head
    cost = DecoderCost(
        layer_parameters=shape.parameters - head - embedding,
        head_parameters=head,
        kv_token_bytes=shape.kv_token_bytes(shape.num_layers, DTYPE_BYTES[dtype]),
        pair_flop=4.0 * shape.num_layers * shape.num_heads * shape.head_dim,
        weight_element_bytes=DTYPE_BYTES[dtype],
    )
    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    width = int(config["intermediate_size"])
    attention = [(queries + 2 * keys, hidden), (hidden, queries)]
    return cost, [*attention, (2 * width, hidden), (hidden, width)]
