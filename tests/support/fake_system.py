"""A system of fake processes, for tests of the launcher: see `tests/services/fake_process.py`."""

import sys
from collections.abc import Callable
from pathlib import Path

from pipemax.proto.config import EngineConfig
from pipemax.services.launcher.processes import ProcessSpec

FAKE_PROCESS = Path(__file__).parents[1] / "services" / "fake_process.py"


def fake_config(name: str = "t", stages: int = 2) -> EngineConfig:
    return EngineConfig(
        name=name,
        model="/none",
        served_model_name="none",
        pipeline_parallel_size=stages,
        layer_split=(1,) * stages,
        max_model_len=16,
    )


def fakes(**behaviours: str) -> Callable[[EngineConfig, Path], tuple[ProcessSpec, ...]]:
    """Fake processes; `stage_1="crash"` gives stage-1 that behaviour, the rest just live."""

    def specs(config: EngineConfig, run_dir: Path) -> tuple[ProcessSpec, ...]:
        stages = [f"stage-{index}" for index in range(config.pipeline_parallel_size)]
        return tuple(
            ProcessSpec(name, (*_program(name, behaviours), "--run-dir", str(run_dir)))
            for name in ("coordinator", "kv-daemon", *stages)
        )

    return specs


def _program(name: str, behaviours: dict[str, str]) -> tuple[str, ...]:
    behaviour = behaviours.get(name.replace("-", "_"), "live")
    return (sys.executable, str(FAKE_PROCESS), name, behaviour)
