"""What a system leaves in its run directory, and how it goes away again."""

import contextlib
import os
import re
import shutil
from pathlib import Path

from pipemax.proto.config import CONFIG_FILE, EngineConfig, save_config
from pipemax.proto.errors import PipemaxError
from pipemax.proto.process import error_file
from pipemax.proto.rundir import INGEST_ENDPOINT_FILE, LOG_DIR, METRICS_PORT_FILE, RunLock
from pipemax.services.launcher.processes import log_file
from pipemax.stage_worker.channels.keys import KEYS_FILE, create_activation_keys

MODEL_DIR = "model"
"""In the run directory: the text side of a model that has no folder of its own."""

_OWNED_PATTERNS = (
    "*.sock",
    "*.error",
    "act-*.endpoint*",
    f"{KEYS_FILE}*",
    METRICS_PORT_FILE,
    f"{INGEST_ENDPOINT_FILE}*",
    CONFIG_FILE,
)
_OWN_NAME = re.compile(r"[a-z]+(?:-\d+)?-(\d+)")
_TAIL_BYTES = 4096


def fill(run_dir: Path, config: EngineConfig) -> None:
    """Writes what the processes of the system read: configuration, keys, and for a modelled GPU
    without a model folder what stands for one. Call it with the lock held."""
    save_config(config, run_dir)
    if config.activation_transport == "tcp":
        create_activation_keys(run_dir)
    if Path(config.model) == run_dir / MODEL_DIR:
        from pipemax.services.tiny_model import make_text_folder

        make_text_folder(run_dir / MODEL_DIR)


def clean(run_dir: Path) -> None:
    """Removes all but the logs and the lock. Call it with the lock held."""
    shutil.rmtree(run_dir / MODEL_DIR, ignore_errors=True)
    for pattern in _OWNED_PATTERNS:
        for path in run_dir.glob(pattern):
            path.unlink(missing_ok=True)


def clean_logs(run_dir: Path) -> None:
    """Removes the logs of the system's last run."""
    for path in (run_dir / LOG_DIR).glob("*.log"):
        path.unlink(missing_ok=True)


def last_words(run_dir: Path, process: str) -> str | None:
    """Why a process left: the line of its error file, else the last line of its log."""
    with contextlib.suppress(OSError):
        if line := error_file(run_dir, process).read_text(errors="replace").strip():
            return line
    with contextlib.suppress(OSError), log_file(run_dir, process).open("rb") as log:
        log.seek(max(0, log.seek(0, os.SEEK_END) - _TAIL_BYTES))
        lines = log.read().decode(errors="replace").split("\n")
        return next((line.strip()[:500] for line in reversed(lines) if line.strip()), None)
    return None


def own_name(purpose: str) -> str:
    """Name of a system that lives only as long as this process: `batch-4711`. Who has several of
    them numbers the purpose: `bench-1-4711`."""
    return f"{purpose}-{os.getpid()}"


def remove(run_dir: Path) -> None:
    """Removes the whole run directory of a system named by `own_name`."""
    shutil.rmtree(run_dir, ignore_errors=True)


def sweep(root: Path, purpose: str) -> None:
    """Removes run directories of `own_name(purpose)` systems whose process was killed."""
    for path in root.glob(f"{purpose}-*"):
        match = _OWN_NAME.fullmatch(path.name)
        if match is None or Path(f"/proc/{match.group(1)}").exists():
            continue
        try:
            lock = RunLock(path)
        except (OSError, PipemaxError):
            continue
        remove(path)
        lock.release()
