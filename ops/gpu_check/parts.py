"""What is checked, in which order, and how long each part may take.

A part's limit is well above what it should take on one card; together they may take no more than
TOTAL_LIMIT_S, so that the whole stays below ten minutes.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCE_FOLDERS = (
    "services",
    "stage_worker",
    "kv_daemon",
    "coordinator",
    "proto",
    "tests",
    "ops",
    "ops/benchmarks",
)
"""Where parts import from."""
TOTAL_LIMIT_S = 590.0


@dataclass(frozen=True, slots=True)
class Settings:
    """How one part is to run."""

    findings: Path
    limit_s: float
    rehearse: bool


@dataclass(frozen=True, slots=True)
class Part:
    name: str
    shows: str
    limit_s: float
    command: Callable[[Settings], list[str]]


def tests(*files: str) -> Callable[[Settings], list[str]]:
    """Files of tests/gpu. Warnings are errors in our own suite only: another torch warns of other
    things. The suite's limit for a test is lifted: the part has one."""

    def command(settings: Settings) -> list[str]:
        return [
            sys.executable, "-m", "pytest", "-v", "--no-header", "--tb=short",
            "-p", "gpu_check.pytest_findings", "--findings", str(settings.findings),
            "-o", "filterwarnings=default",
            "-o", "timeout=0", "-p", "no:cacheprovider",
            *(["--rehearse"] if settings.rehearse else []),
            *(f"tests/gpu/{file}" for file in files),
        ]  # fmt: skip

    return command


def benchmark(script: str) -> Callable[[Settings], list[str]]:
    """A script of ops/benchmarks."""

    def command(settings: Settings) -> list[str]:
        return [
            sys.executable, f"ops/benchmarks/{script}", "--findings", str(settings.findings),
            *(["--rehearse"] if settings.rehearse else []),
        ]  # fmt: skip

    return command


PARTS = (
    Part(
        "runtime",
        "CUDA IPC memory, events, streams, pinning and errors, across processes",
        45,
        tests("test_runtime.py"),
    ),
    Part(
        "kernels",
        "attention kernels against a float64 reference",
        90,
        tests("test_kernels.py"),
    ),
    Part(
        "attention",
        "decode attention against the card's copy bandwidth",
        45,
        benchmark("attention_cuda.py"),
    ),
    Part(
        "copies",
        "KV blocks both ways through the daemon, against large pinned copies",
        45,
        benchmark("copies_cuda.py"),
    ),
    Part(
        "exactness",
        "the whole system's greedy tokens and logits against transformers",
        170,
        tests("test_logits.py", "test_exactness.py"),
    ),
    Part(
        "crash",
        "killed stages and daemons: same tokens, no GPU memory held, attached again",
        100,
        tests("test_crash.py"),
    ),
    Part(
        "throughput",
        "an 8B-shaped model, one stage, against a plain single-process loop",
        120,
        benchmark("gpu_throughput.py"),
    ),
    Part(
        "offload",
        "offloading on against off in 24 GB, 2 and 4 stages, beside the simulator",
        190,
        benchmark("offload_cuda.py"),
    ),
    Part(
        "gap",
        "time between decode steps on a stage, and that nothing there waits for the GPU",
        60,
        benchmark("host_gap_cuda.py"),
    ),
)
