"""PipeMax processes for tests, forked from a server that has imported torch already.

Importing torch and transformers takes seconds; a test with four processes would spend most of its
time there. The forkserver imports them once. What runs in the child is what `python -m` runs.
"""

import contextlib
import importlib
import multiprocessing
import os
import sys
from collections.abc import Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from pipemax.proto.process import run_process
from pipemax.proto.rundir import LOG_DIR

_MODEL_FAMILIES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3",
    "phi3",
    "olmo2",
    "granite",
    "gpt_neox",
    "mixtral",
    "qwen3_moe",
)
_PRELOAD = (
    "torch",
    *(f"transformers.models.{family}.modeling_{family}" for family in _MODEL_FAMILIES),
    "pipemax.stage_worker.main",
    "pipemax.stage_worker.sampling.main",
    "pipemax.kv_daemon.main",
    "pipemax.coordinator.main",
)

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(list(_PRELOAD))


def start_process(name: str, body_path: str, run_dir: Path, index: int = 0) -> ForkServerProcess:
    """Starts the process `name` (`coordinator`, `kv-daemon`, `stage-0`).

    `body_path` is `package.module:function`. Output goes to `<run_dir>/logs/<name>.log`. The
    process ends with the test process, however that ends. The caller joins it and closes it.
    """
    environ = {key: value for key, value in os.environ.items() if key.startswith("PIPEMAX_")}
    process = CONTEXT.Process(
        target=_run, name=name, args=(name, body_path, str(run_dir), index, environ)
    )
    process.start()
    return process


def stop_process(process: ForkServerProcess, timeout_s: float = 20.0) -> int | None:
    """Asks `process` to end with SIGTERM, then kills it. Returns its exit status, -9 if killed."""
    process.terminate()
    process.join(timeout_s)
    if process.is_alive():
        process.kill()
        process.join()
    status = process.exitcode
    process.close()
    return status


@contextlib.contextmanager
def running(
    name: str, body_path: str, run_dir: Path, index: int = 0
) -> Iterator[ForkServerProcess]:
    """`start_process` that also stops it."""
    process = start_process(name, body_path, run_dir, index)
    try:
        yield process
    finally:
        stop_process(process)


def log_of(run_dir: Path, name: str) -> str:
    """What the process has written so far."""
    path = run_dir / LOG_DIR / f"{name}.log"
    return path.read_text() if path.exists() else ""


def _run(name: str, body_path: str, run_dir: str, index: int, environ: dict[str, str]) -> None:
    """In the child."""
    logs = Path(run_dir) / LOG_DIR
    logs.mkdir(mode=0o700, exist_ok=True)
    log = os.open(logs / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    os.environ.update(environ)
    module, function = body_path.split(":")
    body = getattr(importlib.import_module(module), function)
    parent = multiprocessing.parent_process()
    assert parent is not None
    # End-of-file on this pipe means that the test process is gone.
    sys.exit(run_process(name, body, Path(run_dir), index, parent.sentinel))
