"""Facts about this machine that a bug report needs. Imports none of the packages it reports on."""

import os
import platform
import resource
import shutil
import subprocess
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

from pipemax.kv_daemon.numa import num_nodes
from pipemax.proto.rundir import runtime_root
from pipemax.proto.sizes import format_size
from pipemax.services.gpus import look_at_gpus
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
    "triton",
    "flashinfer-python",
)
_NVIDIA_SMI_TIMEOUT_S = 20
_SHOWN_PREFIXES = (
    "PIPEMAX_",
    "OMP_",
    "MKL_",
    "CUDA_",
    "NVIDIA_",
    "PYTORCH_",
    "TRITON_",
    "HF_HUB_OFFLINE",
)


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
    yield "memory nodes", str(num_nodes())
    yield "pinned memory", _memlock()
    yield "GPU driver", _driver()
    yield from _gpus()
    yield "run directories", str(runtime_root())
    for name in sorted(os.environ):
        if name.startswith(_SHOWN_PREFIXES):
            yield name, os.environ[name]


def _or_none(value: float | None, unit: str) -> str:
    return "none" if value is None else f"{value:g} {unit}"


def _memlock() -> str:
    """What RLIMIT_MEMLOCK lets a process pin."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    unlimited = soft == resource.RLIM_INFINITY
    return "no limit" if unlimited else f"at most {format_size(soft)} (ulimit -l)"


def _gpus() -> Iterator[tuple[str, str]]:
    """What PipeMax's processes will see of them."""
    found = look_at_gpus()
    if found.error is not None:
        yield "GPUs", f"none: {found.error}"
    for gpu in found.gpus:
        if gpu.error is not None:
            yield f"GPU {gpu.ordinal}", f"cannot be used: {gpu.error}"
            continue
        major, minor = gpu.compute_capability
        node = "" if gpu.numa_node is None else f", memory node {gpu.numa_node}"
        peers = ", ".join(map(str, gpu.peers)) or "none"
        yield (
            f"GPU {gpu.ordinal}",
            f"{gpu.name}, {format_size(gpu.free_bytes)} of {format_size(gpu.total_bytes)} free, "
            f"compute capability {major}.{minor}, {gpu.pci_bus_id}{node}, reads the memory of: "
            f"{peers}",
        )


def _driver() -> str:
    """What nvidia-smi says: it needs neither torch nor a working CUDA runtime. One line for each
    GPU, or why there is none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return "no nvidia-smi"
    query = [program, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(
            query, capture_output=True, text=True, timeout=_NVIDIA_SMI_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        return f"nvidia-smi failed: {' '.join(str(error).split())}"
    return "; ".join(answer.stdout.strip().splitlines()) or "no GPU"
