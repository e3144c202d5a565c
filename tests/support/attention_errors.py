"""Errors of an attention backend over `attention_cases.CASES`, in several processes at once: most
of the time kernels are compiled, which takes a core each.

    python -m support.attention_errors triton cuda 3 11 19    (numbers of cases; prints JSON)

Number -1 is `check_far_blocks`.
"""

import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pipemax.proto.geometry import BlockGeometry
from pipemax.stage_worker.attention.device.base import AttentionBackend
from pipemax.stage_worker.attention.device.select import open_attention
from support import attention_cases
from support.attention_cases import CASES, Case

FAR_BLOCKS = -1
Found = dict[int, tuple[float, str]]
"""By case: ‖out − expected‖ / ‖expected‖, and what is wrong beside it; empty if nothing is."""


def measure(name: str, device: str, numbers: Sequence[int], processes: int) -> Found:
    """Raises RuntimeError when a process ends without an answer."""
    shares = [numbers[first::processes] for first in range(processes)]
    started = [_start(name, device, share) for share in shares if share]
    found: Found = {}
    try:
        for process in started:
            out, errors = process.communicate()
            if process.returncode:
                lines = errors.strip().splitlines() or [f"status {process.returncode}"]
                raise RuntimeError(f"{name}: {lines[-1]}")
            found |= {number: (error, wrong) for number, error, wrong in json.loads(out)}
    finally:
        for process in started:
            process.kill()
            process.communicate()
    return found


def _start(name: str, device: str, numbers: Sequence[int]) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", __spec__.name, name, device, *map(str, numbers)],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def open_backend(name: Any, case: Case, device: torch.device) -> AttentionBackend:
    geometry = BlockGeometry(3, case.block_size, case.kv_heads, case.head_dim, case.dtype)
    return open_attention(geometry, case.kv_heads * case.group, name, device).backend


def relative_error(backend: AttentionBackend, case: Case, device: torch.device) -> float:
    """Infinite for an output that is not finite everywhere. Raises AssertionError when the pool is
    not what it should be, bit by bit, or an element is off."""
    prepared = attention_cases.prepare(case, device)
    _poison(device, prepared.query)
    attention_cases.check(backend, case, device)
    _poison(device, prepared.query)
    out, _ = attention_cases.run(backend, prepared)
    out = out.double()
    if not bool(torch.isfinite(out).all()):
        return math.inf
    return float((out - prepared.expected).norm() / prepared.expected.norm())


def _poison(device: torch.device, like: torch.Tensor) -> None:
    """Fills the memory that torch is about to give out with NaN, so that an output that is not
    written shows."""
    if device.type == "cuda":
        spoiled = [torch.full_like(like, math.nan) for _ in range(8)]
        spoiled += [torch.full((size,), math.nan, device=device) for size in (2**12, 2**16, 2**21)]
        del spoiled


def _of_case(name: str, number: int, device: torch.device) -> tuple[float, str]:
    try:
        if number == FAR_BLOCKS:
            backend = open_backend(name, Case("float16"), device)
            attention_cases.check_far_blocks(backend, device)
            return 0.0, ""
        case = CASES[number]
        return relative_error(open_backend(name, case, device), case, device), ""
    except Exception as error:
        return 0.0, f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"


def main() -> None:
    name, device, *numbers = sys.argv[1:]
    if os.environ.get("TRITON_INTERPRET") == "1" and name == "triton":
        from support.triton_interpreter import _mend_interpreter

        _mend_interpreter()
    results = [(number, *_of_case(name, number, torch.device(device)))
               for number in map(int, numbers)]  # fmt: skip
    json.dump([(n, str(e) if math.isinf(e) else e, w) for n, e, w in results], sys.stdout)


if __name__ == "__main__":
    main()
