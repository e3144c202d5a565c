"""Processes of a real system with an artificial delay in one place: each is the process's own body
with one function of it made slower."""

import time
from pathlib import Path
from typing import Any

DELAY_S = 0.05


def _later(function: Any) -> Any:
    """The function, and then the delay."""

    def slow(*args: Any, **named: Any) -> Any:
        found = function(*args, **named)
        time.sleep(DELAY_S)
        return found

    return slow


def stage(run_dir: Path, index: int) -> None:
    """Computes each step for longer."""
    from pipemax.stage_worker import main
    from pipemax.stage_worker.modelled.step import ModelledStep

    ModelledStep.compute = _later(ModelledStep.compute)  # type: ignore[method-assign]
    main.body(run_dir, index)


def hop(run_dir: Path, index: int) -> None:
    """Its rows take longer to the next stage."""
    from pipemax.stage_worker import main
    from pipemax.stage_worker.modelled import step

    prepare = step.ModelledStep.prepare

    def slow(self: Any, plan: Any) -> Any:
        batch = prepare(self, plan)
        return step.ModelledBatch(
            batch.columns, batch.context, batch.compute_s, batch.hop_s + DELAY_S
        )

    step.ModelledStep.prepare = slow  # type: ignore[method-assign]
    main.body(run_dir, index)


SLOW_LINK = 1
"""Stage whose link `kv_daemon` makes slow."""


def kv_daemon(run_dir: Path, index: int) -> None:
    """Copies of one stage, host to device, take longer."""
    from pipemax.kv_daemon import cpu_engine, main

    copy = cpu_engine._CopyThread._copy

    def slow(self: Any, *work: Any) -> None:
        copy(self, *work)
        if (self._stage, self._direction) == (SLOW_LINK, "load"):
            time.sleep(DELAY_S)

    cpu_engine._CopyThread._copy = slow  # type: ignore[method-assign]
    main.body(run_dir, index)


def coordinator(run_dir: Path, index: int) -> None:
    """Plans later."""
    from pipemax.coordinator import main
    from pipemax.coordinator.events import ToStages
    from pipemax.coordinator.shell import CoordinatorShell

    carry_out = CoordinatorShell._carry_out

    def slow(self: Any, command: Any) -> None:
        if isinstance(command, ToStages):
            time.sleep(DELAY_S)
        carry_out(self, command)

    CoordinatorShell._carry_out = slow  # type: ignore[method-assign]
    main.body(run_dir, index)


def sampler(run_dir: Path, index: int) -> None:
    """Samples for longer."""
    from pipemax.stage_worker.sampling import main
    from pipemax.stage_worker.sampling.worker import SamplerWorker

    SamplerWorker.sample = _later(SamplerWorker.sample)  # type: ignore[method-assign]
    main.body(run_dir, index)
