"""What the processes of `tests/repo/test_forkserver.py` do."""

import os
import time
from pathlib import Path

from pipemax.proto.errors import ConfigError


def report(run_dir: Path, index: int) -> None:
    """Writes its OS name, its index and its runtime directory to `report`."""
    name = Path("/proc/self/comm").read_text().strip()
    (run_dir / "report").write_text(f"{name} {index} {os.environ['PIPEMAX_RUNTIME_DIR']}")


def refuse(run_dir: Path, index: int) -> None:
    raise ConfigError("cannot work like this")


def wait(run_dir: Path, index: int) -> None:
    """Writes its pid to `pid`, then does nothing."""
    (run_dir / "pid.new").write_text(str(os.getpid()))
    (run_dir / "pid.new").rename(run_dir / "pid")
    time.sleep(600)
