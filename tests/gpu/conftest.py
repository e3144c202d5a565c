"""Tests that need a GPU. Without one they are skipped; `--rehearse` runs what can be run of them on
a CPU: systems with `--device cpu`, kernels in Triton's interpreter, a simulated CUDA.

Reading these files imports neither triton nor cupy.
"""

import gc
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from support.leaks import Snapshot, kill_leaked_processes, leaks, snapshot
from support.source_tree import ROOT

for _folder in ("ops", "ops/benchmarks"):
    if str(ROOT / _folder) not in sys.path:
        sys.path.append(str(ROOT / _folder))

REHEARSE = "--rehearse"
_NO_GPU = "torch finds no CUDA device"
_SETTLE_S = 5.0
"""What processes that were told to end may take to do so."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(REHEARSE, action="store_true", help="tests/gpu on the CPU, as far as can be")


def _is_rehearsal(config: pytest.Config) -> bool:
    return bool(config.getoption(REHEARSE, default=False))


def pytest_configure(config: pytest.Config) -> None:
    if _is_rehearsal(config):
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not _is_rehearsal(config) and not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason=_NO_GPU))


@pytest.fixture(scope="session")
def rehearsal(request: pytest.FixtureRequest) -> bool:
    return _is_rehearsal(request.config)


@pytest.fixture(scope="session")
def device(rehearsal: bool) -> torch.device:
    """Where this process computes. Opening CUDA opens files and threads that stay until the process
    ends: see the fixtures about what tests leave behind."""
    if rehearsal:
        return torch.device("cpu")
    found = torch.device("cuda", 0)
    torch.zeros(1, device=found)
    return found


@pytest.fixture
def figure(record_property: Callable[[str, Any], None]) -> Callable[..., None]:
    """Reports a figure to gpu-check: `figure(name, value, unit, at_most=...)`; see FindingsWriter.
    A figure that misses its target fails the part, not the test."""

    def report(name: str, value: float | str, unit: str = "", **rest: Any) -> None:
        record_property("figure", {"name": name, "value": value, "unit": unit, **rest})

    return report


@pytest.fixture(scope="session", autouse=True)
def _nothing_outlives_the_session(device: torch.device) -> Iterator[None]:
    """As in the conftest above, once CUDA is open."""
    yield from _leaving_nothing(device)


@pytest.fixture(autouse=True)
def _nothing_left_behind(runtime_dir: Path, device: torch.device) -> Iterator[None]:
    yield from _leaving_nothing(device)


def _leaving_nothing(device: torch.device) -> Iterator[None]:
    """Of files, threads and mappings CUDA and its libraries open some when they are first needed,
    and keep them; so on a GPU only processes, shared memory and locks are looked for."""
    before = snapshot()
    yield
    deadline_s = time.monotonic() + _SETTLE_S
    while (found := leaks(before, _without_cudas(before, device))) and (
        time.monotonic() < deadline_s
    ):
        gc.collect()
        time.sleep(0.05)
    kill_leaked_processes(before)
    if found:
        pytest.fail("left behind:\n  " + "\n  ".join(found))


def _without_cudas(before: Snapshot, device: torch.device) -> Snapshot:
    after = snapshot()
    if device.type == "cpu":
        return after
    return replace(after, fds=before.fds, threads=before.threads, mappings=before.mappings)
