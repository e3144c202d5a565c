"""One stage on a simulated GPU, in this process, driven by a test."""

import contextlib
import select
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from pipemax.proto import cuda
from pipemax.proto.config import EngineConfig
from pipemax.proto.messages.control import StepPlan
from pipemax.proto.messages.kv import PoolAttached
from pipemax.stage_worker.channels.ring import Rows
from pipemax.stage_worker.devices.cuda import torch_side as real_torch_side
from pipemax.stage_worker.devices.cuda.engine import CudaEngine
from pipemax.stage_worker.state_clock import StateClock
from pipemax.stage_worker.step_queue import StepQueue
from support.fake_cuda import FakeCudaProcess, FakeMachine, torch_side
from support.local_system import cuda_config

DEADLINE_S = 30.0
PUMP_MS = 50


@contextlib.contextmanager
def simulated(directory: Path, **knobs: Any) -> Iterator[FakeCudaProcess]:
    """This process on a machine with simulated GPUs."""
    directory.mkdir(exist_ok=True)
    process = FakeCudaProcess(FakeMachine(directory=str(directory), **knobs))
    with (
        mock.patch.object(cuda, "open_runtime", process.open_runtime),
        mock.patch.object(real_torch_side, "open_torch", torch_side.open_torch),
    ):
        yield process


@contextlib.contextmanager
def open_stage(config: EngineConfig, stage: int = 0) -> Iterator[CudaEngine]:
    engine = CudaEngine(config, stage, None)
    try:
        yield engine
    finally:
        engine.close()


@dataclass(frozen=True, slots=True)
class Done:
    step: int
    compute_s: float
    tokens: list[int] | None


@dataclass
class FakeLinks:
    """`executor.Links` without sockets. `react` sees every finished step and may plan more."""

    clock: StateClock
    react: Callable[[Done], None] = lambda done: None
    stopping: bool = False
    done: list[Done] = field(default_factory=list)
    computed_steps: list[tuple[int, int]] = field(default_factory=list)
    rows: list[tuple[int, Rows]] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    seconds: list[dict[str, float]] = field(default_factory=list)
    during_pump: Callable[[], None] = lambda: None
    _handlers: dict[int, Callable[[], None]] = field(default_factory=dict)

    def pump(self, *, wait: bool) -> None:
        self.during_pump()
        ready, _, _ = select.select(list(self._handlers), [], [], PUMP_MS / 1e3 if wait else 0)
        for fd in ready:
            self._handlers[fd]()

    def send_rows(self, plan: StepPlan, rows: Rows) -> None:
        self.log.append(f"rows {plan.step}")
        self.rows.append((plan.step, rows))

    def step_done(
        self, plan: StepPlan, compute_s: float, tokens: list[int] | None, *rest: object
    ) -> None:
        self.log.append(f"done {plan.step}")
        self.seconds.append(self.clock.seconds())
        self.done.append(Done(plan.step, compute_s, tokens))
        self.react(self.done[-1])

    def computed(self, plan: StepPlan, event: int = -1) -> None:
        self.log.append(f"computed {plan.step}")
        self.computed_steps.append((plan.step, event))

    def listen(self, fd: int, handler: Callable[[], None]) -> None:
        self._handlers[fd] = handler


def ready_queue(engine: CudaEngine, epoch: int = 1, *, takes_activations: bool) -> StepQueue:
    """As after a Reset that everybody answered."""
    engine.kv.attach(PoolAttached(epoch=epoch))
    queue = StepQueue(takes_activations=takes_activations)
    queue.reset(epoch)
    return queue


def stage_config(model_dir: Path, gpus: tuple[int, ...] = (0,), **settings: Any) -> EngineConfig:
    cuda_settings = settings.pop("cuda", {})
    defaults: dict[str, Any] = {
        "block_size": 8,
        "device_blocks": 64,
        "host_blocks": 0,
        "max_model_len": 128,
        "max_num_batched_tokens": 64,
        "max_num_seqs": 8,
    }
    return cuda_config(model_dir, gpus=gpus, cuda=cuda_settings, **{**defaults, **settings})
