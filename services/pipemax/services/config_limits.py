"""What layers, lengths and sizes a configuration may have, whatever the device."""

import re

from pipemax.proto.config import EngineConfig
from pipemax.proto.errors import ConfigError
from pipemax.proto.geometry import blocks_for, split_layers
from pipemax.proto.sizes import format_size, parse_size
from pipemax.services.cli.options import EngineOptions

SPARE_BLOCKS = 1
"""Device blocks that the coordinator wants beyond those of the longest request; it checks again
with what the stages report."""


def layer_split(options: EngineOptions, layers: int) -> tuple[int, ...]:
    """As asked, or as even as can be. Raises ConfigError when it does not fit the model."""
    stages = options.pipeline_parallel_size
    if stages > layers:
        raise ConfigError(
            f"--pipeline-parallel-size {stages}: the model has {layers} layers, "
            f"so at most {layers} stages"
        )
    text = options.layer_split
    if text is None:
        return split_layers(layers, stages)
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise ConfigError(f"--layer-split {text}: write the layers of each stage, as in 10,12,10")
    split = tuple(int(part) for part in text.split(","))
    if len(split) != stages:
        raise ConfigError(
            f"--layer-split {text} is for {len(split)} stages, "
            f"but --pipeline-parallel-size is {stages}"
        )
    if sum(split) != layers:
        raise ConfigError(f"--layer-split {text} adds up to {sum(split)}; the model has {layers}")
    return split


def max_model_len(
    asked: int | None, limit: int | None, config: EngineConfig, block_bytes: int
) -> int:
    """As asked if it fits the model and the device pool; by default the longest that fits both.

    limit: tokens the model was made for; None when nobody says.
    block_bytes: a KV block on the stage with the most layers: that stage's pool holds least.
    """
    if asked is not None and limit is not None and asked > limit:
        raise ConfigError(f"--max-model-len {asked}: the model was made for at most {limit} tokens")
    blocks = config.pool_bytes // block_bytes
    fitting = (blocks - SPARE_BLOCKS) * config.block_size
    wanted = asked if asked is not None else 1
    if wanted > fitting:
        needed = (blocks_for(wanted, config.block_size) + SPARE_BLOCKS) * block_bytes
        what = "" if asked is None else f"for --max-model-len {asked} "
        raise ConfigError(
            f"--kv-cache-memory-bytes {config.pool_bytes} is too small: one request "
            f"{what}needs {needed} bytes ({format_size(needed)}) on each stage"
        )
    if asked is not None:
        return asked
    return fitting if limit is None else min(limit, fitting)


def size_of(flag: str, text: str) -> int:
    """Bytes; ConfigError names the flag."""
    try:
        return parse_size(text)
    except ConfigError as error:
        raise ConfigError(f"{flag}: {error}") from error
