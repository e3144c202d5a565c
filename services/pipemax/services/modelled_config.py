"""`--device modelled:<gpu>`: a configuration in the sizes of a GPU that is not at hand."""

import json
from pathlib import Path

import msgspec

from pipemax.proto.config import EngineConfig
from pipemax.proto.errors import ConfigError, ModelError
from pipemax.proto.modelled import KV_TOKEN_BYTES, Gpu, ModelledDevice, ModelShape
from pipemax.proto.rundir import run_dir_of
from pipemax.proto.sizes import format_size
from pipemax.services.cli.options import EngineOptions
from pipemax.services.config_limits import layer_split, max_model_len
from pipemax.services.launcher.rundir_files import MODEL_DIR
from pipemax.services.machine import memory_bytes
from pipemax.services.tiny_model import VOCAB_SIZE
from pipemax.stage_worker.modelled.catalogue import load_catalogue
from pipemax.stage_worker.modelled.roofline import StageModel

MODELLED = "modelled"
DEFAULT_HOST_BYTES = 400 * 10**9
"""As `pipemax simulate` assumes."""


def modelled_config(options: EngineOptions, config: EngineConfig) -> EngineConfig:
    """`config` with all that depends on GPU and model. Raises ConfigError or ModelError for what
    is not in the catalogue or does not fit."""
    catalogue = load_catalogue(options.catalogue)
    kind, _, name = options.device.partition(":")
    if kind != MODELLED or not name:
        raise ConfigError(
            f"--device {options.device}: write modelled:GPU, with one of "
            f"{', '.join(sorted(catalogue.gpus))}"
        )
    gpu, shape = catalogue.gpu(name), catalogue.model(config.model)
    _check_flags(options)
    split = layer_split(options, shape.num_layers)
    if split is None:
        raise ConfigError(
            "--layer-split auto measures layers, and modelled GPUs compute none; write even, or "
            "the layers of each stage"
        )
    folder = _model_folder(Path(config.model))
    device = ModelledDevice(
        gpu=gpu,
        shape=shape,
        vocab_size=VOCAB_SIZE if folder is None else _vocab_size(folder),
        time_scale=options.modelled_time_scale,
    )
    link_bytes_s = config.emulate_link_bandwidth_bytes_s or gpu.link_bytes_s
    host_bytes = DEFAULT_HOST_BYTES if options.kv_offloading_size is None else None
    config = msgspec.structs.replace(
        config,
        device=MODELLED,
        modelled=device,
        model=str(run_dir_of(config.name) / MODEL_DIR if folder is None else folder),
        layer_split=split,
        kv_cache_memory_bytes=_device_bytes(options, config, gpu, shape, split),
        kv_offloading_bytes=config.kv_offloading_bytes if host_bytes is None else host_bytes,
        emulate_link_bandwidth_bytes_s=max(1, round(link_bytes_s / device.time_scale)),
        threads_per_stage=1,
    )
    block_bytes = device.block_bytes(max(split), config.block_size)
    limit = None if folder is None else _longest_sequence(folder)
    _check_memory(config)
    return msgspec.structs.replace(
        config, max_model_len=max_model_len(options.max_model_len, limit, config, block_bytes)
    )


def _check_flags(options: EngineOptions) -> None:
    if not 0 < options.modelled_time_scale < float("inf"):
        raise ConfigError(
            f"--modelled-time-scale {options.modelled_time_scale:g}: give a number above 0"
        )
    if options.dtype not in ("auto", "bfloat16"):
        raise ConfigError(
            f"--dtype {options.dtype}: the catalogue's rates are bfloat16's; modelled GPUs compute "
            "and keep KV in that"
        )
    if options.load_format != "auto":
        raise ConfigError(
            f"--load-format {options.load_format}: modelled stages load no weights; leave it out"
        )
    if options.sampler_workers:
        raise ConfigError(
            f"--sampler-workers {options.sampler_workers}: modelled GPUs make their tokens up, and "
            "there is nothing to sample from; leave it out"
        )
    if options.threads_per_stage is not None:
        raise ConfigError("--threads-per-stage: modelled stages compute nothing; leave it out")
    if options.fused_layers is not None:
        raise ConfigError("--fused-layers: modelled stages compute nothing; leave it out")


def _device_bytes(
    options: EngineOptions,
    config: EngineConfig,
    gpu: Gpu,
    shape: ModelShape,
    split: tuple[int, ...],
) -> int:
    """KV pool of each stage: as asked, or what the fullest GPU has left. More on the others would
    never be used: the stage that holds the fewest blocks decides for all."""
    left_bytes = int(min(StageModel(gpu, shape, layers).kv_bytes for layers in set(split)))
    if options.kv_cache_memory_bytes is None:
        return left_bytes
    if config.pool_bytes > left_bytes:
        raise ConfigError(
            f"--kv-cache-memory-bytes {format_size(config.pool_bytes)}: beside the "
            f"weights {gpu.name} has {format_size(left_bytes)} left"
        )
    return config.pool_bytes


def _check_memory(config: EngineConfig) -> None:
    """Of this machine: modelled blocks are small, but there may be very many."""
    assert config.modelled is not None
    needed = config.held_host_bytes
    for layers in config.layer_split:
        block_bytes = config.modelled.block_bytes(layers, config.block_size)
        num_blocks = config.pool_bytes // block_bytes
        needed += num_blocks * config.block_size * KV_TOKEN_BYTES
    there = memory_bytes()
    if needed > there:
        raise ConfigError(
            f"{format_size(needed)} needed for {KV_TOKEN_BYTES} bytes per token of modelled KV, "
            f"{format_size(there)} of memory there: lower --kv-offloading-size or "
            "--kv-cache-memory-bytes"
        )


def _model_folder(path: Path) -> Path | None:
    """The folder that has config.json, and perhaps a tokenizer; None for a name of the
    catalogue."""
    path = path.expanduser().absolute()
    if path.is_dir():
        return path
    return path.parent if path.name == "config.json" and path.is_file() else None


def _vocab_size(folder: Path) -> int:
    return _config_number(folder, "vocab_size") or VOCAB_SIZE


def _longest_sequence(folder: Path) -> int | None:
    return _config_number(folder, "max_position_embeddings")


def _config_number(folder: Path, key: str) -> int | None:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {path}: {error}") from error
    value = config.get("text_config", config).get(key)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelError(f"{path}: {key} is {value!r}, which is no positive whole number")
    return value
