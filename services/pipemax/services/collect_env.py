"""Facts about this machine that a bug report needs. Imports none of the packages it reports on."""

import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

from pipemax.proto.rundir import runtime_root
from pipemax.proto.sizes import format_size
from pipemax.services.machine import (
    available_memory_bytes,
    cpu_quota_cores,
    memory_bytes,
    memory_limit_bytes,
    usable_cores,
)

PACKAGES = (
    "pipemax",
    "torch",
    "transformers",
    "safetensors",
    "numpy",
    "numba",
    "tokenizers",
    "pyzmq",
    "msgspec",
    "cupy-cuda12x",
    "cupy-cuda13x",
)
_NVIDIA_SMI_TIMEOUT_S = 20
_SHOWN_PREFIXES = ("PIPEMAX_", "OMP_", "MKL_", "CUDA_", "HF_HUB_OFFLINE")


def describe_environment() -> Iterator[tuple[str, str]]:
    """(name, value) pairs, in the order in which to print them."""
    yield "python", f"{platform.python_version()} ({platform.python_implementation()})"
    for package in PACKAGES:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            yield package, "not installed"
    yield "system", f"{platform.system()} {platform.release()} {platform.machine()}"
    yield "cores", f"{usable_cores()} usable of {os.cpu_count()}"
    yield "cgroup CPU quota", _or_none(cpu_quota_cores(), "cores")
    memory, available = format_size(memory_bytes()), format_size(available_memory_bytes())
    yield "memory", f"{memory}, {available} available"
    limit = memory_limit_bytes()
    yield "cgroup memory limit", "none" if limit is None else format_size(limit)
    yield "GPUs", _gpus()
    yield "run directories", str(runtime_root())
    for name in sorted(os.environ):
        if name.startswith(_SHOWN_PREFIXES):
            yield name, os.environ[name]


def _or_none(value: float | None, unit: str) -> str:
    return "none" if value is None else f"{value:g} {unit}"


def _gpus() -> str:
    """What nvidia-smi says: it needs neither torch nor a working CUDA runtime."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return "none (no nvidia-smi)"
    query = [program, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(
            query, capture_output=True, text=True, timeout=_NVIDIA_SMI_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        return f"nvidia-smi failed: {' '.join(str(error).split())}"
    return "; ".join(answer.stdout.strip().splitlines()) or "none"
