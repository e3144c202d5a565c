"""Which processes a system consists of and how each is started."""

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pipemax.proto.config import Device, EngineConfig
from pipemax.proto.rundir import LOG_DIR
from pipemax.services.gpus import cuda_environment
from pipemax.services.launcher.supervisor import COORDINATOR

_THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMBA_NUM_THREADS",
)
_WAIT_POLICY = "OMP_WAIT_POLICY"
"""By default OpenMP's threads wait for each other by spinning. But a stage is never alone on its
cores: coordinator, KV daemon and other stages take turns there, and a thread that spins keeps the
one it waits for from running (measured: 22 against 360 tokens/s on a busy machine, and 2 % the
other way on a quiet one; see ops/benchmarks/LOG.md)."""
_TUNABLES, _HUGE_PAGES = "GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"
"""Has malloc ask for huge pages: a CPU stage reads all its weights in every step (measured: decode
steps 3 to 10 % shorter; see ops/benchmarks/LOG.md). C libraries that do not know it ignore it."""


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """One process. `--parent-pipe-fd N` is appended to `argv` when it starts."""

    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    """Added to the launcher's own environment."""


def system_processes(config: EngineConfig, run_dir: Path) -> tuple[ProcessSpec, ...]:
    """Coordinator, KV daemon, stages and samplers, in the order in which they start."""
    alone = thread_environment(1)
    opens_cuda = alone if config.cuda is None else alone | cuda_environment()
    computes = stage_environment(config.threads_per_stage, config.device)
    stages = (
        _python_process("stage_worker", f"stage-{index}", run_dir, computes, index)
        for index in range(config.pipeline_parallel_size)
    )
    samplers = (
        _python_process("stage_worker.sampling", f"sampler-{index}", run_dir, alone, index)
        for index in range(config.sampler_workers)
    )
    return (
        _python_process("coordinator", COORDINATOR, run_dir, alone),
        _python_process("kv_daemon", "kv-daemon", run_dir, opens_cuda),
        *stages,
        *samplers,
    )


def stage_environment(threads: int, device: Device) -> dict[str, str]:
    """For a stage, and for whatever is measured to be set beside one. Huge pages are asked for
    unless the user tunes malloc himself."""
    environment = thread_environment(threads)
    if device == "cuda":
        environment |= cuda_environment()
    if device == "cpu" and _TUNABLES not in os.environ:
        environment[_TUNABLES] = _HUGE_PAGES
    return environment


def thread_environment(threads: int) -> dict[str, str]:
    """For a process that computes with so many threads."""
    environment = dict.fromkeys(_THREAD_VARIABLES, str(threads))
    environment[_WAIT_POLICY] = os.environ.get(_WAIT_POLICY, "PASSIVE")
    return environment


def _python_process(
    package: str,
    name: str,
    run_dir: Path,
    environment: Mapping[str, str],
    index: int | None = None,
) -> ProcessSpec:
    # -P: the folder `pipemax` was called from is no place to import modules from.
    argv = [sys.executable, "-P", "-m", f"pipemax.{package}", "--run-dir", str(run_dir)]
    if index is not None:
        argv += ["--index", str(index)]
    return ProcessSpec(name, tuple(argv), environment)


def log_file(run_dir: Path, process: str) -> Path:
    """Where everything that `process` prints goes."""
    return run_dir / LOG_DIR / f"{process}.log"


class Children:
    """The live child processes, and the pipe by which they notice that the launcher is gone.

    Start children from a thread that lives as long as the system: the kernel's parent-death
    signal fires when the *thread* that started a child ends.
    """

    def __init__(self, specs: tuple[ProcessSpec, ...], run_dir: Path) -> None:
        self._specs = {spec.name: spec for spec in specs}
        self._run_dir = run_dir
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        # Only this process holds the write end (both are close-on-exec, the read end is passed on
        # by name), so that its end, however it comes, is end-of-file for every child.
        self._read_fd, self._write_fd = os.pipe()

    def pids(self) -> dict[str, int]:
        """Pid of each child that has not been reaped. May be called from any thread."""
        return {name: child.pid for name, child in self._children.copy().items()}

    def start(self, name: str) -> None:
        """Starts the process in a session of its own, so that Ctrl-C reaches only the launcher.
        Raises OSError when the kernel refuses."""
        spec = self._specs[name]
        with log_file(self._run_dir, name).open("ab", buffering=0) as log:
            self._children[name] = subprocess.Popen(
                [*spec.argv, "--parent-pipe-fd", str(self._read_fd)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **spec.env},
                pass_fds=(self._read_fd,),
                start_new_session=True,
            )

    def signal(self, name: str, signum: int) -> None:
        """Signals the process; does nothing when it has left."""
        if name in self._children:
            self._children[name].send_signal(signum)

    def reap(self) -> list[tuple[str, int]]:
        """Name and status of each child that has left since the last call."""
        left = [
            (name, status)
            for name, child in self._children.items()
            if (status := child.poll()) is not None
        ]
        for name, _ in left:
            del self._children[name]
        return left

    def close(self) -> None:
        """Kills and reaps whatever is left, and closes the pipe."""
        for child in self._children.values():
            child.kill()
        for child in self._children.values():
            child.wait()
        self._children.clear()
        os.close(self._read_fd)
        os.close(self._write_fd)
