"""From what a user asked for to a configuration that can work, or one line that says why not."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from pipemax.coordinator.policy import make_policy
from pipemax.proto.config import EngineConfig
from pipemax.proto.errors import ConfigError
from pipemax.proto.geometry import BlockGeometry, Dtype, blocks_for, split_layers
from pipemax.proto.sizes import format_size, parse_size
from pipemax.services.cli.options import EngineOptions
from pipemax.services.machine import memory_bytes, usable_cores
from pipemax.stage_worker.model.inspect import ModelInfo, inspect_model

SPARE_BLOCKS = 1
"""Device blocks that the coordinator wants beyond those of the longest request; it checks again
with what the stages report."""
_FLAG_OF_FIELD = {
    "kv_offloading_bytes": "--kv-offloading-size",
    "emulate_link_bandwidth_bytes_s": "--emulate-link-bandwidth",
}


def build_config(options: EngineOptions, name: str) -> EngineConfig:
    """The configuration of the system `name`, validated as far as can be before it starts.

    Raises ConfigError naming the flag, the value and what would work; ModelError and
    UnsupportedModelError for the model folder.
    """
    if not options.ready_timeout > 0:
        raise ConfigError(f"--ready-timeout {options.ready_timeout:g}: must be more than 0 seconds")
    if not options.model:
        raise ConfigError("--model is missing: give the folder of the model to run")
    config = _checked_fields(options, options.model, name)
    model_dir = Path(options.model).expanduser().absolute()
    info = inspect_model(model_dir)
    split = _layer_split(options, info)
    _check_memory(config, info)
    return msgspec.structs.replace(
        config,
        model=str(model_dir),
        layer_split=split,
        max_model_len=_max_model_len(options.max_model_len, config, split, info),
        threads_per_stage=options.threads_per_stage or max(1, usable_cores() // len(split)),
    )


def _checked_fields(options: EngineOptions, model: str, name: str) -> EngineConfig:
    """The fields that need no look at the model; those that do hold a valid stand-in."""
    if options.device == "cuda":
        raise ConfigError("--device cuda is not implemented yet; use --device cpu")
    make_policy(options.policy)
    bandwidth = options.emulate_link_bandwidth
    values: dict[str, Any] = {
        "name": name,
        "model": model,
        "served_model_name": options.served_model_name or model,
        "pipeline_parallel_size": options.pipeline_parallel_size,
        "layer_split": (1,),
        "device": options.device,
        "dtype": options.dtype,
        "max_model_len": 1 if options.max_model_len is None else options.max_model_len,
        "block_size": options.block_size,
        "kv_cache_memory_bytes": _size("--kv-cache-memory-bytes", options.kv_cache_memory_bytes),
        "kv_offloading_bytes": _size("--kv-offloading-size", options.kv_offloading_size),
        "emulate_link_bandwidth_bytes_s": (
            None if bandwidth is None else _size("--emulate-link-bandwidth", bandwidth)
        ),
        "max_num_seqs": options.max_num_seqs,
        "max_num_batched_tokens": options.max_num_batched_tokens,
        "policy": options.policy,
        "seed": options.seed,
        "activation_transport": options.activation_transport,
        "warm_up_s": options.warm_up_s,
        "threads_per_stage": (
            1 if options.threads_per_stage is None else options.threads_per_stage
        ),
        "metrics_host": options.metrics_host,
        "metrics_port": options.metrics_port,
    }
    try:
        return msgspec.convert(values, EngineConfig)
    except msgspec.ValidationError as error:
        raise _name_the_flag(error, values) from error


def _name_the_flag(error: msgspec.ValidationError, values: Mapping[str, Any]) -> ConfigError:
    """msgspec says `Expected `int` >= 1 - at `$.block_size``."""
    match = re.fullmatch(r"(.*) - at `\$\.(\w+).*`", str(error))
    if match is None:
        return ConfigError(str(error))
    problem, field = match.groups()
    flag = _FLAG_OF_FIELD.get(field, "--" + field.replace("_", "-"))
    if problem.startswith("Invalid enum value"):
        choices = msgspec.json.schema(EngineConfig)["$defs"]["EngineConfig"]["properties"]
        problem = "choose " + ", ".join(choices[field]["enum"])
    elif "matching regex" in problem:
        problem = "use at most 40 letters, digits, dots, dashes and underscores"
    else:
        problem = problem[0].lower() + problem[1:].replace("`", "")
    return ConfigError(f"{flag} {values[field]}: {problem}")


def _size(flag: str, text: str) -> int:
    try:
        return parse_size(text)
    except ConfigError as error:
        raise ConfigError(f"{flag}: {error}") from error


def _layer_split(options: EngineOptions, info: ModelInfo) -> tuple[int, ...]:
    stages, layers = options.pipeline_parallel_size, info.num_layers
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


def _max_model_len(
    asked: int | None, config: EngineConfig, split: tuple[int, ...], info: ModelInfo
) -> int:
    """As asked if it fits the model and the device pool; by default the longest that fits both."""
    limit = info.max_position_embeddings
    if asked is not None and asked > limit:
        raise ConfigError(f"--max-model-len {asked}: the model was made for at most {limit} tokens")
    block_bytes = largest_block_bytes(config, split, info)
    blocks = config.kv_cache_memory_bytes // block_bytes
    fitting = (blocks - SPARE_BLOCKS) * config.block_size
    wanted = asked if asked is not None else 1
    if wanted > fitting:
        needed = (blocks_for(wanted, config.block_size) + SPARE_BLOCKS) * block_bytes
        what = "" if asked is None else f"for --max-model-len {asked} "
        raise ConfigError(
            f"--kv-cache-memory-bytes {config.kv_cache_memory_bytes} is too small: one request "
            f"{what}needs {needed} bytes ({format_size(needed)}) on each stage"
        )
    return asked if asked is not None else min(limit, fitting)


def largest_block_bytes(config: EngineConfig, split: tuple[int, ...], info: ModelInfo) -> int:
    """Bytes of one KV block on the stage with the most layers: that stage's pool holds least."""
    dtype: Dtype = info.dtype if config.dtype == "auto" else config.dtype
    geometry = BlockGeometry(
        num_layers=max(split),
        block_size=config.block_size,
        num_kv_heads=info.num_kv_heads,
        head_dim=info.head_dim,
        dtype=dtype,
    )
    return geometry.block_bytes


def _check_memory(config: EngineConfig, info: ModelInfo) -> None:
    """Pools are filled with pages at once: what cannot fit would end in the kernel's killer."""
    device = config.kv_cache_memory_bytes * config.pipeline_parallel_size
    needed = device + config.kv_offloading_bytes + info.weights_bytes
    there = memory_bytes()
    if needed > there:
        raise ConfigError(
            f"{format_size(needed)} needed, {format_size(there)} of memory there: "
            f"weights {format_size(info.weights_bytes)}, device pools {format_size(device)} "
            f"(--kv-cache-memory-bytes), host pool {format_size(config.kv_offloading_bytes)} "
            "(--kv-offloading-size)"
        )
