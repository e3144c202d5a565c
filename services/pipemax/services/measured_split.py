"""`--layer-split auto`: layers are measured on each kind of device, and shared out by that."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import msgspec

from pipemax.proto.config import EngineConfig
from pipemax.proto.errors import ConfigError
from pipemax.proto.geometry import split_layers
from pipemax.services.config_limits import SPARE_BLOCKS
from pipemax.services.launcher.processes import stage_environment
from pipemax.services.layer_split import Load, Split, StageRoom, choose_split, describe
from pipemax.stage_worker.layer_costs import ModelCosts
from pipemax.stage_worker.model.inspect import ModelInfo

_PROMPT_TOKENS, _OUTPUT_TOKENS = 344.0, 237.0
"""Mean lengths of ShareGPT's requests: nothing is known yet of those that will come."""
_MEASURE = "pipemax.stage_worker.measure"
_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class StageDevice:
    """What a stage computes on."""

    kind: str
    """Stages on the same kind share one measurement."""
    gpu: int | None
    """Ordinal; None on the CPU."""
    stages_on_it: int
    """They compute in turns."""
    room: StageRoom


def measured_split(
    config: EngineConfig,
    info: ModelInfo,
    devices: Sequence[StageDevice],
    asked_len: int | None,
    notice: Callable[[str], None],
) -> tuple[Split, tuple[ModelCosts, ...]]:
    """The best split, and each stage's costs. Raises ConfigError when none fits, or when measuring
    fails: `--layer-split even` then does without.

    config: all of it but the split and what follows from it. asked_len: `--max-model-len`.
    """
    notice("measuring layers to share them out (--layer-split even does without)")
    measured = _measure_each({device.kind: device for device in devices}, config, info)
    costs = tuple(measured[device.kind].scaled(device.stages_on_it) for device in devices)
    rooms = [device.room for device in devices]
    layer = info.kv_geometry(1, 1, config.dtype)
    load = load_of(config, info, asked_len)
    found = choose_split(costs, rooms, layer.token_bytes, load)
    even = split_layers(info.num_layers, len(devices))
    notice(_why(found, even, describe(even, costs, rooms, layer.token_bytes, load)))
    return found, costs


def load_of(config: EngineConfig, info: ModelInfo, asked_len: int | None) -> Load:
    """What a split is made for, as long as nothing is known of the requests that will come."""
    longest = config.block_size if asked_len is None else asked_len
    most = info.max_position_embeddings if asked_len is None else asked_len
    shorter = min(1.0, most / (_PROMPT_TOKENS + _OUTPUT_TOKENS))
    return Load(
        max_num_seqs=min(config.max_num_seqs, config.max_num_batched_tokens),
        prompt_tokens=shorter * _PROMPT_TOKENS,
        output_tokens=shorter * _OUTPUT_TOKENS,
        least_pool_tokens=longest + SPARE_BLOCKS * config.block_size,
    )


def _why(found: Split, even_layers: tuple[int, ...], even: Split | None) -> str:
    text = f"layer split {_layers(found.layers)}: measured, {_expected(found)}"
    if found.layers == even_layers:
        return text
    if even is None:
        return f"{text}; evenly, as {_layers(even_layers)}, it does not fit"
    fewer = 1 - max(found.request_s) / max(even.request_s)
    return (
        f"{text}; evenly, as {_layers(even_layers)}, {_expected(even)}, which serves "
        f"{fewer:.1%} fewer requests"
    )


def _expected(split: Split) -> str:
    stages = ", ".join(f"{seconds * 1e3:.2f}" for seconds in split.decode_s)
    return f"a decode step of {split.batch} requests takes {stages} ms"


def _layers(split: Sequence[int]) -> str:
    return ",".join(map(str, split))


def _measure_each(
    devices: dict[str, StageDevice], config: EngineConfig, info: ModelInfo
) -> dict[str, ModelCosts]:
    """By kind of device, all at once."""
    deadline_s = time.monotonic() + _TIMEOUT_S
    with ExitStack() as stack:
        children = {}
        for kind, device in devices.items():
            child = _start(config, device, info)
            stack.callback(_end, child)
            children[kind] = child
        return {kind: _result(child, deadline_s) for kind, child in children.items()}


def _start(config: EngineConfig, device: StageDevice, info: ModelInfo) -> "subprocess.Popen[bytes]":
    child = subprocess.Popen(
        [sys.executable, "-P", "-m", _MEASURE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, **stage_environment(config.threads_per_stage, config.device)},
    )
    assert child.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it says why on stderr
        child.stdin.write(msgspec.json.encode(_config_for(config, device, info)))
        child.stdin.close()
    child.stdin = None
    return child


def _config_for(config: EngineConfig, device: StageDevice, info: ModelInfo) -> EngineConfig:
    cuda = config.cuda
    if cuda is not None:
        assert device.gpu is not None
        cuda = msgspec.structs.replace(cuda, gpus=(device.gpu,), names=(), block_bytes=(1,))
    return msgspec.structs.replace(
        config,
        pipeline_parallel_size=1,
        layer_split=(info.num_layers,),
        cuda=cuda,
        max_model_len=info.max_position_embeddings,
    )


def _result(child: "subprocess.Popen[bytes]", deadline_s: float) -> ModelCosts:
    try:
        out, words = child.communicate(timeout=max(0.0, deadline_s - time.monotonic()))
        if child.returncode == 0:
            return msgspec.json.decode(out, type=ModelCosts)
        lines = words.decode(errors="replace").strip().splitlines()
        reason = lines[-1] if lines else f"exit status {child.returncode}"
    except subprocess.TimeoutExpired:
        reason = f"no result after {_TIMEOUT_S:g} s"
    except msgspec.DecodeError as error:
        reason = str(error)
    raise ConfigError(
        f"--layer-split auto: measuring layers failed: {reason}; --layer-split even does without"
    )


def _end(child: "subprocess.Popen[bytes]") -> None:
    child.kill()
    for pipe in (child.stdout, child.stderr):
        if pipe is not None:
            pipe.close()
    child.wait()
