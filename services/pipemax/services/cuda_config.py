"""`--device cuda`: a configuration for the GPUs that are there."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import msgspec

from pipemax.proto.config import CudaDevice, EngineConfig
from pipemax.proto.errors import ConfigError
from pipemax.proto.geometry import DTYPE_BYTES
from pipemax.proto.sizes import format_size
from pipemax.services.cli.options import EngineOptions
from pipemax.services.config_limits import (
    SPARE_BLOCKS,
    block_bytes,
    dtype_of,
    layer_split,
    max_model_len,
    name_the_flag,
)
from pipemax.services.gpus import assign_gpus, find_gpus
from pipemax.services.layer_split import StageRoom
from pipemax.services.machine import available_memory_bytes, memory_bytes
from pipemax.services.measured_split import StageDevice, measured_split
from pipemax.stage_worker.devices.cuda.list_gpus import GpuReport
from pipemax.stage_worker.layer_costs import ModelCosts
from pipemax.stage_worker.model.inspect import ModelInfo

CUDA: Final = "cuda"
_BLOCK_BYTES: Final = 512 * 2**10
"""Contiguous blocks of half a MiB and more copy at the speed of the link; larger ones only waste
more in each request's last one."""
_BLOCK_SIZES: Final = (16, 32, 64)
_HOST_SHARE: Final = 2
"""One part in so many of the available memory is for the host pool, unless the flag says more:
pinned pages are lost to everybody else."""
_HOST_PER_DEVICE: Final = 2
"""At most so many times the GPUs' memory: pinning takes time, and with few stages more KV than this
could not come back in time anyway."""
_RESERVED_BYTES: Final = 1_500_000_000
"""On each GPU, for a context and the results of a step, about; on a small one a sixteenth."""
_LEN_SHARE: Final = 0.8
"""The default longest request takes so much of the pool that is expected: what a stage really has
left is known only when it has loaded."""


def refuse_cuda_flags(options: EngineOptions) -> None:
    """On other devices these mean nothing."""
    only_there: Mapping[str, object] = {
        "--gpus": options.gpus,
        "--gpu-memory-utilization": options.gpu_memory_utilization,
        "--attention-backend": options.attention_backend,
        "--enforce-eager": options.enforce_eager or None,
        "--kv-copies": options.kv_copies,
    }
    for flag, value in only_there.items():
        if value is not None:
            raise ConfigError(f"{flag} goes with --device cuda")


def cuda_config(
    options: EngineOptions,
    config: EngineConfig,
    info: ModelInfo,
    notice: Callable[[str], None],
) -> EngineConfig:
    """`config` with all that depends on the GPUs. Raises ConfigError for what they cannot do."""
    stages = config.pipeline_parallel_size
    fields = _fields(options, stages)
    fixed = options.kv_cache_memory_bytes is not None
    _check_flags(options, info)
    found = find_gpus()
    gpus = assign_gpus(options.gpus, stages, found, notice)
    config = msgspec.structs.replace(
        config,
        device=CUDA,
        cuda=msgspec.structs.replace(
            fields, gpus=gpus, names=tuple(found[gpu].name for gpu in gpus)
        ),
        kv_cache_memory_bytes=config.kv_cache_memory_bytes if fixed else None,
        kv_offloading_bytes=_host_bytes(options, config, found, gpus, notice),
        activation_transport="ipc"
        if options.activation_transport == "ipc"
        else config.activation_transport,
        threads_per_stage=options.threads_per_stage or 1,
    )
    devices = [_device(config, found[gpu], gpus.count(gpu)) for gpu in gpus]
    split, weights = _split(options, config, info, devices, notice)
    _check_weights(config, found, devices, weights)
    if options.block_size is None:
        config = msgspec.structs.replace(config, block_size=_block_size(config, min(split), info))
    blocks = tuple(block_bytes(config, layers, info) for layers in split)
    assert config.cuda is not None
    config = msgspec.structs.replace(
        config, layer_split=split, cuda=msgspec.structs.replace(config.cuda, block_bytes=blocks)
    )
    return msgspec.structs.replace(
        config, max_model_len=_max_model_len(options, config, info, devices, weights)
    )


def _check_flags(options: EngineOptions, info: ModelInfo) -> None:
    """Those that need no look at a GPU, which takes seconds."""
    if options.fused_layers:
        raise ConfigError(
            "--fused-layers: GPUs run transformers' own modules, as CUDA graphs; leave it out"
        )
    if options.emulate_link_bandwidth is not None:
        raise ConfigError("--emulate-link-bandwidth: a GPU's link is real; leave it out")
    if options.kv_cache_memory_bytes is not None and options.gpu_memory_utilization is not None:
        raise ConfigError(
            "--gpu-memory-utilization and --kv-cache-memory-bytes both size the KV pool; give one"
        )
    asked, limit = options.max_model_len, info.max_position_embeddings
    if asked is not None and asked > limit:
        raise ConfigError(f"--max-model-len {asked}: the model was made for at most {limit} tokens")
    layer_split(options, info.num_layers)


def _fields(options: EngineOptions, stages: int) -> CudaDevice:
    """With stand-ins for what depends on GPUs and layers."""
    given = {
        "gpu_memory_utilization": options.gpu_memory_utilization,
        "attention_backend": options.attention_backend,
        "enforce_eager": options.enforce_eager,
        "kv_copies": options.kv_copies,
    }
    values: dict[str, Any] = {"gpus": (0,) * stages, "block_bytes": (1,) * stages}
    values |= {field: value for field, value in given.items() if value is not None}
    try:
        return msgspec.convert(values, CudaDevice)
    except msgspec.ValidationError as error:
        raise name_the_flag(error, values, CudaDevice) from error


def _host_bytes(
    options: EngineOptions,
    config: EngineConfig,
    found: Sequence[GpuReport],
    gpus: Sequence[int],
    notice: Callable[[str], None],
) -> int:
    """Of the host pool. Weights are not in host memory here."""
    there = memory_bytes()
    if options.kv_offloading_size is not None:
        if config.kv_offloading_bytes > there:
            raise ConfigError(
                f"--kv-offloading-size {options.kv_offloading_size}: more than the "
                f"{format_size(there)} of memory there, all of which would be pinned"
            )
        return config.kv_offloading_bytes
    on_gpus = sum(found[gpu].total_bytes for gpu in set(gpus))
    share = min(available_memory_bytes(), there) // _HOST_SHARE
    size_bytes = min(share, _HOST_PER_DEVICE * on_gpus) // 2**20 * 2**20
    notice(f"host pool {format_size(size_bytes)}, pinned; --kv-offloading-size changes it")
    return size_bytes


def _device(config: EngineConfig, gpu: GpuReport, sharing: int) -> StageDevice:
    assert config.cuda is not None
    reserved = min(_RESERVED_BYTES, gpu.total_bytes // 16)
    usable = gpu.free_bytes
    if config.kv_cache_memory_bytes is None:
        usable = min(usable, int(config.cuda.gpu_memory_utilization * gpu.total_bytes))
    return StageDevice(
        kind=f"{gpu.name}, {gpu.total_bytes} bytes",
        gpu=gpu.ordinal,
        stages_on_it=sharing,
        room=StageRoom(max(0, usable // sharing - reserved), config.kv_cache_memory_bytes),
    )


def _split(
    options: EngineOptions,
    config: EngineConfig,
    info: ModelInfo,
    devices: Sequence[StageDevice],
    notice: Callable[[str], None],
) -> tuple[tuple[int, ...], list[int]]:
    """Layers of each stage, and about how many bytes its weights take."""
    given = layer_split(options, info.num_layers, default="auto")
    if given is not None:
        return given, _about_bytes(config, info, given)
    found, costs = measured_split(config, info, devices, options.max_model_len, notice)
    return found.layers, _measured_bytes(costs, found.layers)


def _measured_bytes(costs: Sequence[ModelCosts], split: Sequence[int]) -> list[int]:
    weights, first = [], 0
    for stage, layers in enumerate(split):
        cost = costs[stage]
        weights.append(sum(cost.layer_bytes[first : first + layers]))
        first += layers
    weights[0] += costs[0].embedding_bytes
    weights[-1] += costs[-1].head_bytes
    return weights


def _about_bytes(config: EngineConfig, info: ModelInfo, split: Sequence[int]) -> list[int]:
    """As if head and embedding were two tensors of all that the checkpoint holds."""
    element = DTYPE_BYTES[dtype_of(config, info)]
    whole = info.weights_bytes * element // DTYPE_BYTES[info.dtype]
    table = info.vocab_size * info.hidden_size * element
    layer = max(0, whole - 2 * table) // info.num_layers
    weights = [layer * layers for layers in split]
    weights[0] += table
    weights[-1] += table
    return weights


def _check_weights(
    config: EngineConfig,
    found: Sequence[GpuReport],
    devices: Sequence[StageDevice],
    weights: Sequence[int],
) -> None:
    """What cannot fit is refused before it is loaded."""
    for stage, (device, size_bytes) in enumerate(zip(devices, weights, strict=True)):
        assert device.gpu is not None
        assert device.room.limit_bytes is not None
        gpu = found[device.gpu]
        pool = config.kv_cache_memory_bytes or 0
        if size_bytes + pool <= device.room.limit_bytes:
            continue
        sharing = device.stages_on_it
        raise ConfigError(
            f"stage {stage}: weights of about {format_size(size_bytes)}"
            + (f" and a KV pool of {format_size(pool)}" if pool else "")
            + f" do not fit GPU {gpu.ordinal} ({gpu.name}, {format_size(gpu.free_bytes)} of "
            f"{format_size(gpu.total_bytes)} free"
            + (f", {sharing} stages share it" if sharing > 1 else "")
            + f"), of which the stage may use {format_size(device.room.limit_bytes)}: take more "
            "GPUs (--pipeline-parallel-size), another --layer-split, or a "
            + ("smaller --kv-cache-memory-bytes" if pool else "larger --gpu-memory-utilization")
        )


def _block_size(config: EngineConfig, fewest_layers: int, info: ModelInfo) -> int:
    """The smallest whose blocks are large enough to copy fast on every stage."""
    token_bytes = block_bytes(config, fewest_layers, info) // config.block_size
    large = (size for size in _BLOCK_SIZES if size * token_bytes >= _BLOCK_BYTES)
    return next(large, _BLOCK_SIZES[-1])


def _max_model_len(
    options: EngineOptions,
    config: EngineConfig,
    info: ModelInfo,
    devices: Sequence[StageDevice],
    weights: Sequence[int],
) -> int:
    """As asked, or what the pools are expected to hold. The coordinator checks with what the
    stages report."""
    asked, limit = options.max_model_len, info.max_position_embeddings
    assert config.cuda is not None
    if config.kv_cache_memory_bytes is not None:
        return max_model_len(asked, limit, config, max(config.cuda.block_bytes))
    if asked is not None:
        return asked
    left = (
        ((device.room.limit_bytes or 0) - size_bytes) // block
        for device, size_bytes, block in zip(devices, weights, config.cuda.block_bytes, strict=True)
    )
    fitting = (int(_LEN_SHARE * min(left)) - SPARE_BLOCKS) * config.block_size
    if fitting < config.block_size:
        raise ConfigError(
            "about nothing is left for KV beside the weights: take more GPUs "
            "(--pipeline-parallel-size) or a larger --gpu-memory-utilization, or give "
            "--max-model-len to try"
        )
    return min(limit, fitting)
