"""What layers, lengths and sizes a configuration may have, whatever the device."""

import re
from collections.abc import Mapping
from typing import Any

import msgspec

from pipemax.proto.config import EngineConfig
from pipemax.proto.errors import ConfigError
from pipemax.proto.geometry import Dtype, blocks_for, split_layers
from pipemax.proto.sizes import format_size, parse_size
from pipemax.services.cli.options import EngineOptions
from pipemax.stage_worker.model.inspect import ModelInfo

_FLAG_OF_FIELD = {
    "kv_offloading_bytes": "--kv-offloading-size",
    "emulate_link_bandwidth_bytes_s": "--emulate-link-bandwidth",
    "hung_after_s": "--hung-after",
    "max_journal_bytes": "--max-journal-size",
}
MAX_TIMEOUT_S = 1e8
"""That the message Submit takes."""
ESTIMATED = "estimated"
SPARE_BLOCKS = 1
"""Device blocks that the coordinator wants beyond those of the longest request; it checks again
with what the stages report."""


def layer_split(
    options: EngineOptions, layers: int, default: str = "even"
) -> tuple[int, ...] | None:
    """As asked; None when it is to be measured or estimated and there is a choice. Raises
    ConfigError when it does not fit the model."""
    stages = options.pipeline_parallel_size
    if stages > layers:
        raise ConfigError(
            f"--pipeline-parallel-size {stages}: the model has {layers} layers, "
            f"so at most {layers} stages"
        )
    text = options.layer_split or default
    if text == ESTIMATED and options.device != "cpu":
        raise ConfigError(
            f"--layer-split {text} knows CPUs only; write auto, even or the layers of each stage"
        )
    if text in ("auto", ESTIMATED):
        return None if 1 < stages < layers else split_layers(layers, stages)
    if text == "even":
        return split_layers(layers, stages)
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise ConfigError(
            f"--layer-split {text}: write auto, estimated, even or the layers of each stage, as in "
            "10,12,10"
        )
    split = tuple(int(part) for part in text.split(","))
    if len(split) != stages:
        raise ConfigError(
            f"--layer-split {text} is for {len(split)} stages, "
            f"but --pipeline-parallel-size is {stages}"
        )
    if sum(split) != layers:
        raise ConfigError(f"--layer-split {text} adds up to {sum(split)}; the model has {layers}")
    return split


def dtype_of(config: EngineConfig, info: ModelInfo) -> Dtype:
    """Of weights, activations and KV."""
    return info.dtype if config.dtype == "auto" else config.dtype


def block_bytes(config: EngineConfig, layers: int, info: ModelInfo) -> int:
    """Of one KV block on a stage of so many layers."""
    return info.kv_geometry(layers, config.block_size, config.dtype).block_bytes


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


def name_the_flag(
    error: msgspec.ValidationError, values: Mapping[str, Any], kind: type[msgspec.Struct]
) -> ConfigError:
    """`values` do not make a `kind`: msgspec says `Expected `int` >= 1 - at `$.block_size``."""
    match = re.fullmatch(r"(.*) - at `\$\.(\w+).*`", str(error))
    if match is None:
        return ConfigError(str(error))
    problem, field = match.groups()
    flag = _FLAG_OF_FIELD.get(field, "--" + field.replace("_", "-"))
    if problem.startswith("Invalid enum value"):
        choices = msgspec.json.schema(kind)["$defs"][kind.__name__]["properties"]
        problem = "choose " + ", ".join(choices[field]["enum"])
        if field == "device":
            problem = "choose cpu, cuda or modelled:GPU, such as modelled:rtx-3090"
    elif "matching regex" in problem:
        problem = "use at most 40 letters, digits, dots, dashes and underscores"
    else:
        problem = problem[0].lower() + problem[1:].replace("`", "")
    return ConfigError(f"{flag} {values[field]}: {problem}")


def request_timeout(seconds: float | None) -> float | None:
    """Of `--request-timeout`, as asked. Raises ConfigError for what is no time."""
    if seconds is not None and not 0 < seconds <= MAX_TIMEOUT_S:
        raise ConfigError(
            f"--request-timeout {seconds:g}: must be more than 0 and at most {MAX_TIMEOUT_S:g} "
            "seconds"
        )
    return seconds


def size_of(flag: str, text: str) -> int:
    """Bytes; ConfigError names the flag."""
    try:
        return parse_size(text)
    except ConfigError as error:
        raise ConfigError(f"{flag}: {error}") from error
