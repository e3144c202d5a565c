"""A launcher over fake processes, to be killed: writes its children's pids as JSON."""

import json
import sys

from pipemax.proto.config import EngineConfig
from pipemax.services.launcher.processes import ProcessSpec
from pipemax.services.launcher.system import System


def main(fake: str) -> None:
    config = EngineConfig(
        name="killed",
        model="/none",
        served_model_name="none",
        layer_split=(1, 1),
        max_model_len=16,
        pipeline_parallel_size=2,
    )
    names = ("coordinator", "kv-daemon", "stage-0", "stage-1")
    with System(
        config,
        processes=lambda _, run_dir: tuple(
            ProcessSpec(name, (sys.executable, fake, name, "live", "--run-dir", str(run_dir)))
            for name in names
        ),
    ) as system:
        system.wait_ready()
        sys.stdout.write(json.dumps(system.pids()) + "\n")
        sys.stdout.flush()
        system.wait()


if __name__ == "__main__":
    main(sys.argv[1])
