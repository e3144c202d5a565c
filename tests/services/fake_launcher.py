"""`pipemax up` over fake processes; run as a script: `fake_launcher.py COORDINATOR_BEHAVIOUR`."""

import sys
from pathlib import Path

from pipemax.proto.config import EngineConfig
from pipemax.services.foreground import run_until_stopped
from pipemax.services.launcher.processes import ProcessSpec
from pipemax.services.launcher.system import System

FAKE = Path(__file__).with_name("fake_process.py")


def main(coordinator_behaviour: str) -> None:
    config = EngineConfig(
        name="fore",
        model="/none",
        served_model_name="none",
        layer_split=(1, 1),
        max_model_len=16,
        pipeline_parallel_size=2,
    )

    def specs(_: EngineConfig, run_dir: Path) -> tuple[ProcessSpec, ...]:
        behaviours = {
            "coordinator": coordinator_behaviour,
            "kv-daemon": "live",
            "stage-0": "live",
            "stage-1": "live",
        }
        return tuple(
            ProcessSpec(
                name, (sys.executable, str(FAKE), name, behaviour, "--run-dir", str(run_dir))
            )
            for name, behaviour in behaviours.items()
        )

    run_until_stopped(System(config, processes=specs))


if __name__ == "__main__":
    main(sys.argv[1])
