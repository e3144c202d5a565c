"""What nvidia-smi says of the GPU that benchmarks run on. Never opens a CUDA context, whose memory
would be part of what is measured."""

import os
import shutil
import subprocess
from collections.abc import Sequence

_TIMEOUT_S = 20


def chosen() -> str:
    """The first GPU this process may see, as nvidia-smi counts them."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0] or "0"


def query(gpu: str, names: Sequence[str]) -> list[str] | None:
    """Values by nvidia-smi's names; None where there is no such GPU."""
    if shutil.which("nvidia-smi") is None:
        return None
    try:
        done = subprocess.run(
            ["nvidia-smi", "-i", gpu, f"--query-gpu={','.join(names)}",
             "--format=csv,noheader,nounits"],
            check=True, capture_output=True, text=True, timeout=_TIMEOUT_S,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    lines = done.stdout.strip().splitlines()
    found = [value.strip() for value in lines[0].split(",")] if lines else []
    return found if len(found) == len(names) else None


def used_mib(gpu: str) -> float | None:
    """Memory in use, of all processes together; None where nobody says."""
    answer = query(gpu, ["memory.used"])
    try:
        return None if answer is None else float(answer[0])
    except ValueError:
        return None


def total_bytes() -> int:
    """Memory of the chosen GPU. Raises SystemExit where there is none."""
    answer = query(chosen(), ["memory.total"])
    if answer is None:
        raise SystemExit("nvidia-smi shows no GPU; --rehearse runs without one")
    return int(float(answer[0]) * 2**20)


def free_bytes() -> int:
    answer = query(chosen(), ["memory.free"])
    if answer is None:
        raise SystemExit("nvidia-smi shows no GPU; --rehearse runs without one")
    return int(float(answer[0]) * 2**20)
