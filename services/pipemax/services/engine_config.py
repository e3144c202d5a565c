"""From what a user asked for to a configuration that can work, or one line that says why not."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from pipemax.coordinator.policy import make_policy
from pipemax.proto.config import EngineConfig
from pipemax.proto.errors import ConfigError, ModelError
from pipemax.proto.geometry import split_layers
from pipemax.proto.sizes import format_size
from pipemax.services.cli.options import EngineOptions
from pipemax.services.config_limits import (
    ESTIMATED,
    block_bytes,
    layer_split,
    max_model_len,
    name_the_flag,
    size_of,
)
from pipemax.services.cuda_config import CUDA, cuda_config, refuse_cuda_flags
from pipemax.services.estimated_split import estimated_split
from pipemax.services.layer_split import StageRoom
from pipemax.services.machine import memory_bytes, usable_cores
from pipemax.services.measured_split import StageDevice, measured_split
from pipemax.services.modelled_config import MODELLED, modelled_config
from pipemax.stage_worker.model.inspect import ModelInfo, inspect_model

log = logging.getLogger(__name__)

SPIN_WAIT_S = 1e-4
"""A few times what waking up takes."""
OTHER_CORES = 2
"""For coordinator and KV daemon: what a stage waits for comes from them as well."""


def build_config(
    options: EngineOptions, name: str, notice: Callable[[str], None] = log.info
) -> EngineConfig:
    """The configuration of the system `name`, validated as far as can be before it starts.
    `notice` gets a line about each choice that was made from what this machine is.

    Raises ConfigError naming the flag, the value and what would work; ModelError and
    UnsupportedModelError for the model folder.
    """
    config = check_options(options, name)
    if options.device.startswith(MODELLED):
        return modelled_config(options, config)
    _refuse_modelled_flags(options)
    model_dir = Path(config.model).expanduser().absolute()
    info = inspect_model(model_dir, config.load_format)
    config = msgspec.structs.replace(config, model=str(model_dir))
    if options.device == CUDA:
        return cuda_config(options, config, info, notice)
    return _cpu_config(options, config, info, notice)


def check_options(options: EngineOptions, name: str) -> EngineConfig:
    """What is wrong with flags whatever the machine and the model. What is returned holds what was
    asked for, and stand-ins for what depends on those. Raises ConfigError."""
    if not options.ready_timeout > 0:
        raise ConfigError(f"--ready-timeout {options.ready_timeout:g}: must be more than 0 seconds")
    if not options.model:
        raise ConfigError("--model is missing: give the folder of the model to run")
    config = _checked_fields(options, options.model, name)
    if options.device != CUDA:
        refuse_cuda_flags(options)
    if options.pin_cores and options.device != "cpu":
        raise ConfigError("--pin-cores goes with --device cpu")
    return config


def _cpu_config(
    options: EngineOptions, config: EngineConfig, info: ModelInfo, notice: Callable[[str], None]
) -> EngineConfig:
    _check_memory(config, info)
    stages = config.pipeline_parallel_size
    cores = usable_cores() - config.sampler_workers
    threads = options.threads_per_stage or max(1, cores // stages)
    spin_wait_s = options.spin_wait_s
    if spin_wait_s is None:
        spin_wait_s = SPIN_WAIT_S if stages * threads + OTHER_CORES <= cores else 0.0
    config = msgspec.structs.replace(config, threads_per_stage=threads, spin_wait_s=spin_wait_s)
    if config.pin_cores and stages * threads > cores:
        raise ConfigError(
            f"--pin-cores: {stages} stages of {threads} threads need {stages * threads} cores, and "
            f"{cores} can be used; lower --threads-per-stage, or leave it out"
        )
    split = _cpu_split(options, config, info, notice)
    limit, largest = info.max_position_embeddings, block_bytes(config, max(split), info)
    return msgspec.structs.replace(
        config,
        layer_split=split,
        max_model_len=max_model_len(options.max_model_len, limit, config, largest),
    )


def _cpu_split(
    options: EngineOptions, config: EngineConfig, info: ModelInfo, notice: Callable[[str], None]
) -> tuple[int, ...]:
    given = layer_split(options, info.num_layers, default=ESTIMATED)
    if given is not None:
        return given
    stages, asked_len = config.pipeline_parallel_size, options.max_model_len
    if options.layer_split == "auto":
        device = StageDevice("cpu", None, 1, StageRoom(None, config.pool_bytes))
        return measured_split(config, info, [device] * stages, asked_len, notice)[0].layers
    try:
        return estimated_split(config, info, asked_len, notice)
    except ModelError:  # a config.json that leaves its shape to its family's defaults
        if options.layer_split == ESTIMATED:
            raise
        return split_layers(info.num_layers, stages)


def _refuse_modelled_flags(options: EngineOptions) -> None:
    if options.catalogue is not None:
        raise ConfigError(f"--catalogue {options.catalogue} goes with --device modelled:GPU")
    if options.modelled_time_scale != 1.0:
        raise ConfigError(
            f"--modelled-time-scale {options.modelled_time_scale:g} goes with --device modelled:GPU"
        )


def _checked_fields(options: EngineOptions, model: str, name: str) -> EngineConfig:
    """The fields that need no look at the model; those that do hold a valid stand-in."""
    if options.activation_transport == "ipc" and options.device != CUDA:
        raise ConfigError("--activation-transport ipc goes with --device cuda")
    make_policy(options.policy)
    known_apart = options.device == CUDA or options.device.startswith(MODELLED)
    ipc = options.activation_transport == "ipc"
    values: dict[str, Any] = {
        "name": name,
        "model": model,
        "load_format": options.load_format,
        "served_model_name": options.served_model_name or model,
        "pipeline_parallel_size": options.pipeline_parallel_size,
        "layer_split": (1,),
        "device": "cpu" if known_apart else options.device,
        "dtype": options.dtype,
        "max_model_len": 1 if options.max_model_len is None else options.max_model_len,
        **({} if options.block_size is None else {"block_size": options.block_size}),
        **_given_sizes(options),
        "max_num_seqs": options.max_num_seqs,
        "max_num_batched_tokens": options.max_num_batched_tokens,
        **({} if options.sampler_workers is None else {"sampler_workers": options.sampler_workers}),
        "policy": options.policy,
        **({} if options.micro_batches is None else {"micro_batches": options.micro_batches}),
        "prefill": options.prefill,
        **({} if options.fused_layers is None else {"fused_layers": options.fused_layers}),
        "enable_prefix_caching": options.enable_prefix_caching,
        "seed": options.seed,
        "activation_transport": "auto" if ipc else options.activation_transport,
        "warm_up_s": options.warm_up_s,
        "pin_cores": options.pin_cores,
        **({} if options.spin_wait_s is None else {"spin_wait_s": options.spin_wait_s}),
        "hung_after_s": options.hung_after,
        "threads_per_stage": (
            1 if options.threads_per_stage is None else options.threads_per_stage
        ),
        "metrics_host": options.metrics_host,
        "metrics_port": options.metrics_port,
    }
    try:
        return msgspec.convert(values, EngineConfig)
    except msgspec.ValidationError as error:
        raise name_the_flag(error, values, EngineConfig) from error


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


def _check_memory(config: EngineConfig, info: ModelInfo) -> None:
    """Pools are filled with pages at once: what cannot fit would end in the kernel's killer."""
    device = config.pool_bytes * config.pipeline_parallel_size
    rows = min(config.max_num_seqs, config.max_num_batched_tokens) * config.num_slots
    logits = 4 * rows * info.vocab_size if config.sampler_workers else 0
    needed = device + config.kv_offloading_bytes + info.weights_bytes + logits
    there = memory_bytes()
    if needed > there:
        raise ConfigError(
            f"{format_size(needed)} needed, {format_size(there)} of memory there: "
            f"weights {format_size(info.weights_bytes)}, device pools {format_size(device)} "
            f"(--kv-cache-memory-bytes), host pool {format_size(config.kv_offloading_bytes)} "
            "(--kv-offloading-size)"
            + (f", logits for samplers {format_size(logits)} (--max-num-seqs)" if logits else "")
        )
