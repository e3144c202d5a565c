"""A coordinator that remembers what every step cost, for benchmarks: it runs the shipped process
and looks over its shoulder.

    python recording_coordinator.py OUT --run-dir DIR [--parent-pipe-fd N]

When the process ends, OUT holds a JSON object: `steps`, a list of [monotonic seconds, stage,
decoding requests, context tokens, prompt tokens, prompt pairs, compute seconds] for every report of
every stage, and `plans`, of [monotonic seconds at which a step's tokens came, seconds until the
next plan had left, 0 when none did].
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

from pipemax.coordinator import main as coordinator
from pipemax.coordinator.cost_model import PipelineCost, StepFeatures
from pipemax.coordinator.events import ToStages
from pipemax.coordinator.shell import CoordinatorShell
from pipemax.proto.messages.control import StepDone
from pipemax.proto.process import process_main

_steps: list[tuple[float | int, ...]] = []
_plans: list[tuple[float, float]] = []
_plan_left_s = 0.0

_observe = PipelineCost.observe
_on_step_done = CoordinatorShell._on_step_done
_carry_out = CoordinatorShell._carry_out


def observe(self: PipelineCost, stage: int, features: StepFeatures, seconds: float) -> float | None:
    _steps.append(
        (
            time.monotonic(),
            stage,
            features.decode_requests,
            features.context_tokens,
            features.prefill_tokens,
            features.prefill_pairs,
            seconds,
        )
    )
    return _observe(self, stage, features, seconds)


def on_step_done(self: CoordinatorShell, message: StepDone) -> None:
    arrived_s = time.monotonic()
    _on_step_done(self, message)
    if message.tokens is not None:
        _plans.append((arrived_s, max(0.0, _plan_left_s - arrived_s)))


def carry_out(self: CoordinatorShell, command: Any) -> None:
    global _plan_left_s
    _carry_out(self, command)
    if isinstance(command, ToStages):
        _plan_left_s = time.monotonic()


def main() -> int:
    out = Path(sys.argv.pop(1))
    PipelineCost.observe = observe  # type: ignore[method-assign]
    CoordinatorShell._on_step_done = on_step_done  # type: ignore[method-assign]
    CoordinatorShell._carry_out = carry_out  # type: ignore[method-assign]

    def body(run_dir: Path, index: int) -> None:
        try:
            coordinator.body(run_dir, index)
        finally:
            out.write_text(json.dumps({"steps": _steps, "plans": _plans}))

    return process_main("coordinator", body)


if __name__ == "__main__":
    sys.exit(main())
