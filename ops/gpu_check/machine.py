"""The machine under check: versions, GPU, commit. Asks other programs, so that this process never
holds a CUDA context of its own."""

import importlib.util
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import gpu_device

from gpu_check.parts import SOURCE_FOLDERS

PACKAGES = (
    "torch",
    "triton",
    "cupy-cuda13x",
    "cupy-cuda12x",
    "flashinfer-python",
    "transformers",
    "safetensors",
    "numpy",
    "numba",
    "tokenizers",
    "pyzmq",
    "msgspec",
    "pytest",
    "hypothesis",
)
MODULES = {
    "torch": "torch",
    "transformers": "transformers",
    "safetensors": "safetensors",
    "numpy": "numpy",
    "numba": "numba",
    "tokenizers": "tokenizers",
    "jinja2": "jinja2",
    "zmq": "pyzmq",
    "msgspec": "msgspec",
    "msgpack": "msgpack",
    "prometheus_client": "prometheus-client",
    "typer": "typer",
    "rich": "rich",
    "psutil": "psutil",
    "pytest": "pytest",
    "pytest_timeout": "pytest-timeout",
    "hypothesis": "hypothesis",
}
"""What PipeMax and its checks import, and the package it comes in."""
GPU_MODULES = {
    "cupy": "cupy-cuda12x or cupy-cuda13x, whichever matches torch.version.cuda",
    "triton": "triton",
}
_QUERY = {
    "name": "name",
    "driver": "driver_version",
    "memory_mib": "memory.total",
    "compute_capability": "compute_cap",
    "link_generation": "pcie.link.gen.max",
    "link_lanes": "pcie.link.width.max",
}
_TIMEOUT_S = 20


def missing_modules(modules: Mapping[str, str]) -> list[str]:
    """Packages to install before anything can run."""
    return [package for name, package in modules.items() if importlib.util.find_spec(name) is None]


def child_environment(root: Path, gpu: str, environ: Mapping[str, str]) -> dict[str, str]:
    """For every part: our sources first, whether or not they are installed; one GPU, and the same
    one for us and for nvidia-smi; nothing from a network."""
    folders = [str(root / folder) for folder in SOURCE_FOLDERS]
    given = environ.get("PYTHONPATH")
    return {
        **environ,
        "PYTHONPATH": os.pathsep.join([*folders, *([given] if given else [])]),
        "PYTHONUNBUFFERED": "1",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": gpu,
        "OMP_NUM_THREADS": environ.get("OMP_NUM_THREADS", "1"),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def describe(root: Path, gpu: str) -> dict[str, object]:
    return {
        "gpu": describe_gpu(gpu),
        "cuda_of_torch": _cuda_of_torch(),
        "versions": {"python": platform.python_version(), **versions(PACKAGES)},
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cores": os.cpu_count(),
        "commit": commit(root),
    }


def versions(packages: Sequence[str]) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def describe_gpu(gpu: str) -> dict[str, str] | None:
    """What nvidia-smi says of it; None where there is none."""
    answer = gpu_device.query(gpu, tuple(_QUERY.values()))
    return None if answer is None else dict(zip(_QUERY, answer, strict=True))


def commit(root: Path) -> str:
    """Of the sources, with a + when files were changed."""
    try:
        head = _output(["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"])
        changed = _output(["git", "-C", str(root), "status", "--porcelain", "--untracked-files=no"])
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return head + "+" * bool(changed)


def _cuda_of_torch() -> str:
    """Without importing torch here: its build number carries it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return "no torch"
    file = Path(next(iter(spec.submodule_search_locations))) / "version.py"
    for line in file.read_text().splitlines() if file.is_file() else ():
        if line.startswith("cuda"):
            return line.partition("=")[2].strip(" '\"")
    return "unknown"


def _output(command: Sequence[str]) -> str:
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=_TIMEOUT_S)
    return done.stdout.strip()
