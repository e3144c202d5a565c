"""Which GPUs there are, and which stage gets which.

The launcher itself never opens CUDA: a context of its own would take memory of every GPU for as
long as the system runs. A child process looks, says what it saw, and leaves.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence

import msgspec

from pipemax.proto.errors import ConfigError
from pipemax.proto.sizes import format_size
from pipemax.stage_worker.devices.cuda.list_gpus import GpuList, GpuReport

_LIST_GPUS = "pipemax.stage_worker.devices.cuda.list_gpus"
_TIMEOUT_S = 120
"""A machine with many GPUs whose driver was not loaded takes half a minute."""


def cuda_environment() -> dict[str, str]:
    """What every process that opens CUDA gets: GPUs in the order of nvidia-smi, not the fastest
    first, unless the user wants it otherwise. Nothing is said about torch's allocator: KV pools
    and rings are allocated outside of it."""
    return {"CUDA_DEVICE_ORDER": os.environ.get("CUDA_DEVICE_ORDER", "PCI_BUS_ID")}


def look_at_gpus() -> GpuList:
    """What a child process sees. An `error` says why there are none."""
    command = [sys.executable, "-P", "-m", _LIST_GPUS]
    environment = {**os.environ, **cuda_environment()}
    try:
        done = subprocess.run(
            command, capture_output=True, timeout=_TIMEOUT_S, check=False, env=environment
        )
        if done.returncode == 0:
            return msgspec.json.decode(done.stdout, type=GpuList)
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        reason = lines[-1] if lines else f"exit status {done.returncode}"
    except (OSError, subprocess.SubprocessError, msgspec.DecodeError) as error:
        reason = " ".join(str(error).split())
    return GpuList(error=f"looking at the GPUs failed: {reason}")


def find_gpus() -> tuple[GpuReport, ...]:
    """Raises ConfigError when `--device cuda` cannot work here."""
    found = look_at_gpus()
    if found.error is not None:
        reason = found.error
        raise ConfigError(reason if "--device cuda" in reason else f"--device cuda: {reason}")
    return found.gpus


def assign_gpus(
    asked: str | None, stages: int, found: Sequence[GpuReport], notice: Callable[[str], None]
) -> tuple[int, ...]:
    """Ordinal of each stage's GPU. Where there are fewer GPUs than stages, neighbouring stages
    share one, as evenly as can be: what passes between them then stays on it.

    asked: `--gpus`; by default the first GPUs, one for each stage.
    """
    given = _usable(found, notice)[:stages] if asked is None else _parse(asked, found)
    if len(given) > stages:
        raise ConfigError(
            f"--gpus {asked} names {len(given)} GPUs, but --pipeline-parallel-size is {stages}"
        )
    gpus = tuple(given[stage * len(given) // stages] for stage in range(stages))
    if len(given) < stages:
        shares = ", ".join(
            f"GPU {gpu} has {gpus.count(gpu)}" for gpu in sorted(set(gpus), key=gpus.index)
        )
        notice(f"{stages} stages on {len(set(gpus))} GPUs: {shares}")
    return gpus


def _parse(asked: str, found: Sequence[GpuReport]) -> tuple[int, ...]:
    parts = asked.split(",")
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise ConfigError(f"--gpus {asked}: write the ordinals of GPUs, as in 0,1,2")
    given = tuple(int(part) for part in parts)
    for gpu in given:
        if gpu >= len(found):
            raise ConfigError(f"--gpus {asked}: there is no GPU {gpu}; {describe_gpus(found)}")
        if found[gpu].error is not None:
            raise ConfigError(f"--gpus {asked}: GPU {gpu} cannot be used: {found[gpu].error}")
    return given


def _usable(found: Sequence[GpuReport], notice: Callable[[str], None]) -> tuple[int, ...]:
    for gpu in found:
        if gpu.error is not None:
            notice(f"GPU {gpu.ordinal} is left out: {gpu.error}")
    usable = tuple(gpu.ordinal for gpu in found if gpu.error is None)
    if not usable:
        raise ConfigError(f"--device cuda: no GPU can be used: {found[0].error}")
    return usable


def describe_gpus(found: Sequence[GpuReport]) -> str:
    """One line."""
    each = (
        f"{gpu.ordinal} {gpu.name} ({format_size(gpu.free_bytes)} of "
        f"{format_size(gpu.total_bytes)} free)"
        for gpu in found
        if gpu.error is None
    )
    return f"this machine shows {', '.join(each)}"
