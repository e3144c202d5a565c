"""From what a user asked for to a configuration that can work, or one line that says why not."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from pipemax.coordinator.policy import make_policy
from pipemax.proto.config import EngineConfig
from pipemax.proto.errors import ConfigError
from pipemax.proto.geometry import BlockGeometry, Dtype
from pipemax.proto.sizes import format_size
from pipemax.services.cli.options import EngineOptions
from pipemax.services.config_limits import layer_split, max_model_len, size_of
from pipemax.services.machine import memory_bytes, usable_cores
from pipemax.services.modelled_config import MODELLED, modelled_config
from pipemax.stage_worker.model.inspect import ModelInfo, inspect_model

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
    if options.device.startswith(MODELLED):
        return modelled_config(options, config)
    _refuse_modelled_flags(options)
    model_dir = Path(options.model).expanduser().absolute()
    info = inspect_model(model_dir)
    split = layer_split(options, info.num_layers)
    _check_memory(config, info)
    block_bytes = largest_block_bytes(config, split, info)
    limit = info.max_position_embeddings
    return msgspec.structs.replace(
        config,
        model=str(model_dir),
        layer_split=split,
        max_model_len=max_model_len(options.max_model_len, limit, config, block_bytes),
        threads_per_stage=options.threads_per_stage or max(1, usable_cores() // len(split)),
    )


def _refuse_modelled_flags(options: EngineOptions) -> None:
    if options.catalogue is not None:
        raise ConfigError(f"--catalogue {options.catalogue} goes with --device modelled:GPU")
    if options.modelled_time_scale != 1.0:
        raise ConfigError(
            f"--modelled-time-scale {options.modelled_time_scale:g} goes with --device modelled:GPU"
        )


def _checked_fields(options: EngineOptions, model: str, name: str) -> EngineConfig:
    """The fields that need no look at the model; those that do hold a valid stand-in."""
    if options.device == "cuda":
        raise ConfigError("--device cuda is not implemented yet; use --device cpu")
    make_policy(options.policy)
    values: dict[str, Any] = {
        "name": name,
        "model": model,
        "served_model_name": options.served_model_name or model,
        "pipeline_parallel_size": options.pipeline_parallel_size,
        "layer_split": (1,),
        "device": "cpu" if options.device.startswith(MODELLED) else options.device,
        "dtype": options.dtype,
        "max_model_len": 1 if options.max_model_len is None else options.max_model_len,
        "block_size": options.block_size,
        **_given_sizes(options),
        "max_num_seqs": options.max_num_seqs,
        "max_num_batched_tokens": options.max_num_batched_tokens,
        "policy": options.policy,
        "prefill": options.prefill,
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


def _given_sizes(options: EngineOptions) -> dict[str, int]:
    given = {
        "kv_cache_memory_bytes": ("--kv-cache-memory-bytes", options.kv_cache_memory_bytes),
        "kv_offloading_bytes": ("--kv-offloading-size", options.kv_offloading_size),
        "emulate_link_bandwidth_bytes_s": (
            "--emulate-link-bandwidth",
            options.emulate_link_bandwidth,
        ),
    }
    return {field: size_of(flag, text) for field, (flag, text) in given.items() if text is not None}


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
        if field == "device":
            problem = f"choose cpu or {MODELLED}:GPU, such as {MODELLED}:rtx-3090"
    elif "matching regex" in problem:
        problem = "use at most 40 letters, digits, dots, dashes and underscores"
    else:
        problem = problem[0].lower() + problem[1:].replace("`", "")
    return ConfigError(f"{flag} {values[field]}: {problem}")


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
    device = config.pool_bytes * config.pipeline_parallel_size
    needed = device + config.kv_offloading_bytes + info.weights_bytes
    there = memory_bytes()
    if needed > there:
        raise ConfigError(
            f"{format_size(needed)} needed, {format_size(there)} of memory there: "
            f"weights {format_size(info.weights_bytes)}, device pools {format_size(device)} "
            f"(--kv-cache-memory-bytes), host pool {format_size(config.kv_offloading_bytes)} "
            "(--kv-offloading-size)"
        )
