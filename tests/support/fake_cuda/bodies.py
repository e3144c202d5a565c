"""The bodies of stages and of the KV daemon, on simulated GPUs: for `forkserver.start_process`.

The machine is found in the run directory (see `gpu_dir`); at its end each process leaves there a
list of its calls that may have blocked it.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from pipemax.kv_daemon import main as kv_daemon_main
from pipemax.proto import cuda
from pipemax.proto.config import load_config
from pipemax.stage_worker import main as stage_main
from pipemax.stage_worker.attention.device import select
from pipemax.stage_worker.devices.cuda import engine, step_ring
from pipemax.stage_worker.devices.cuda import torch_side as real_torch_side
from support.fake_cuda import torch_side
from support.fake_cuda.attention import RecordableBackend
from support.fake_cuda.machine import FakeMachine, gpu_dir
from support.fake_cuda.process import BlockingCall, FakeCudaProcess

DRAIN_S = 2.0
"""Steps in flight are over in milliseconds here, or never."""


def blocking_calls(run_dir: Path, process: str) -> list[BlockingCall]:
    """What process `process` (`stage-0`) left; it must have ended by itself."""
    calls = json.loads(_calls_path(run_dir, process).read_text())
    return [BlockingCall(*call) for call in calls]


def stage(run_dir: Path, index: int) -> None:
    """Plain attention is replaced by one that graphs may hold, unless there are to be none."""
    settings = load_config(run_dir).cuda
    assert settings is not None
    if not settings.enforce_eager:
        _replace(select, "ReferenceBackend", RecordableBackend)
    _replace(step_ring, "DRAIN_S", DRAIN_S)
    _replace(engine, "_DRAIN_S", DRAIN_S)
    with _simulated(run_dir, f"stage-{index}"):
        stage_main.body(run_dir, index)


def kv_daemon(run_dir: Path, index: int) -> None:
    with _simulated(run_dir, "kv-daemon"):
        kv_daemon_main.body(run_dir, index)


def _replace(module: ModuleType, name: str, value: object) -> None:
    """For the rest of the process. What has moved elsewhere since is noticed."""
    if not hasattr(module, name):
        raise AttributeError(f"{module.__name__} has no {name} any more")
    setattr(module, name, value)


def _calls_path(run_dir: Path, process: str) -> Path:
    return gpu_dir(run_dir) / f"{process}.blocking.json"


@contextlib.contextmanager
def _simulated(run_dir: Path, name: str) -> Iterator[None]:
    process = FakeCudaProcess(FakeMachine.load(gpu_dir(run_dir)))
    _replace(cuda, "open_runtime", process.open_runtime)
    _replace(real_torch_side, "open_torch", torch_side.open_torch)
    try:
        yield
    finally:
        process.save_blocking_calls(_calls_path(run_dir, name))
