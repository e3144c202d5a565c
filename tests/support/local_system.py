"""A whole system for tests: the real processes over real sockets, without the launcher.

The processes are forked from a server that has torch imported (see forkserver.py), so a system
starts in a fraction of a second. The launcher itself is tested through the command line.
"""

import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import TracebackType
from typing import Any

from pipemax.client import Client, Completion, SamplingParams
from pipemax.proto.config import CudaDevice, EngineConfig
from pipemax.proto.geometry import BlockGeometry, split_layers
from pipemax.proto.messages.ingest import Status
from pipemax.proto.rundir import RunLock, create_run_dir
from pipemax.services.launcher.rundir_files import fill
from pipemax.stage_worker.model.inspect import inspect_model
from support.fake_cuda.machine import FakeMachine, gpu_dir
from support.forkserver import log_of, start_process, stop_process

_BODIES = {
    "coordinator": "pipemax.coordinator.main:body",
    "kv-daemon": "pipemax.kv_daemon.main:body",
    "stage": "pipemax.stage_worker.main:body",
    "sampler": "pipemax.stage_worker.sampling.main:body",
}
_SIMULATED_BODIES = {
    **_BODIES,
    "kv-daemon": "support.fake_cuda.bodies:kv_daemon",
    "stage": "support.fake_cuda.bodies:stage",
}


def small_config(
    model_dir: Path,
    *,
    stages: int,
    device_blocks: int = 64,
    host_blocks: int = 2048,
    block_size: int = 16,
    max_model_len: int = 448,
    **settings: Any,
) -> EngineConfig:
    """A configuration whose pools are given in blocks of the stage with the most layers."""
    info = inspect_model(model_dir)
    split = split_layers(info.num_layers, stages)
    values: dict[str, Any] = {
        "name": "t",
        "model": str(model_dir),
        "served_model_name": "tiny",
        "pipeline_parallel_size": stages,
        "layer_split": split,
        "block_size": block_size,
        "max_model_len": max_model_len,
        "warm_up_s": 0.0,
        # Offloads wherever it can, also where the default finds that it does not pay.
        "policy": "oldest-first",
        **settings,
    }
    layer = BlockGeometry(1, block_size, info.num_kv_heads, info.head_dim, info.dtype)
    layer_bytes = layer.block_bytes
    values["kv_cache_memory_bytes"] = device_blocks * layer_bytes * max(split)
    values["kv_offloading_bytes"] = host_blocks * layer_bytes * info.num_layers
    return EngineConfig(**values)


def cuda_config(
    model_dir: Path, *, gpus: tuple[int, ...], cuda: dict[str, Any] | None = None, **settings: Any
) -> EngineConfig:
    """`small_config` on GPUs, one stage for each entry; `cuda` are settings of CudaDevice."""
    stages = len(gpus)
    plain = small_config(model_dir, stages=stages, block_size=settings.get("block_size", 16))
    info = inspect_model(model_dir)
    size, heads = plain.block_size, info.num_kv_heads
    block_bytes = tuple(
        BlockGeometry(layers, size, heads, info.head_dim, info.dtype).block_bytes
        for layers in plain.layer_split
    )
    device = {"attention_backend": "reference", **(cuda or {})}
    settings["cuda"] = CudaDevice(gpus=gpus, block_bytes=block_bytes, **device)
    return small_config(model_dir, stages=stages, device="cuda", **settings)


class LocalSystem:
    """Context manager. `processes` by name; kill and start them at will."""

    def __init__(self, config: EngineConfig, machine: FakeMachine | None = None) -> None:
        """machine: simulates its GPUs."""
        self.config = config
        self.run_dir = create_run_dir(config.name)
        self.machine = None if machine is None else machine.at(gpu_dir(self.run_dir))
        self.processes: dict[str, ForkServerProcess] = {}

    def __enter__(self) -> "LocalSystem":
        self._lock = RunLock(self.run_dir)
        try:
            fill(self.run_dir, self.config)
            self.start("coordinator")
            self.start("kv-daemon")
            for index in range(self.config.pipeline_parallel_size):
                self.start(f"stage-{index}")
            for index in range(self.config.sampler_workers):
                self.start(f"sampler-{index}")
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for process in self.processes.values():
            process.terminate()
        for name in list(self.processes):
            stop_process(self.processes.pop(name))
        self._lock.release()
        if error is not None:
            for path in sorted((self.run_dir / "logs").glob("*.log")):
                error.add_note(f"--- {path.name}\n{path.read_text()[-3000:]}")

    def start(self, name: str) -> None:
        numbered = name.startswith(("stage-", "sampler-"))
        role, _, index = name.partition("-") if numbered else (name, "", "0")
        bodies = _BODIES if self.machine is None else _SIMULATED_BODIES
        self.processes[name] = start_process(name, bodies[role], self.run_dir, int(index or 0))

    def kill(self, name: str) -> None:
        """kill -9."""
        process = self.processes.pop(name)
        process.kill()
        process.join()
        process.close()

    def revive(self) -> list[str]:
        """Starts again what has ended by itself, as the launcher does; says what that was."""
        ended = [name for name, process in self.processes.items() if not process.is_alive()]
        for name in ended:
            self.processes.pop(name).close()
            self.start(name)
        return ended

    def client(self) -> Client:
        return Client(self.config.name, timeout_s=90.0)

    def wait_ready(self, client: Client, timeout_s: float = 150.0) -> Status:
        """The first system of a run waits until the forkserver has imported torch and models."""
        deadline = time.monotonic() + timeout_s
        while (status := client.status()).phase != "ready":
            if time.monotonic() > deadline:
                raise AssertionError(f"not ready: {status.missing}")
            time.sleep(0.02)
        return status

    def log(self, name: str) -> str:
        return log_of(self.run_dir, name)


def greedy(max_tokens: int, **settings: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, **settings)


def tokens_of(completions: list[Completion]) -> list[list[int]]:
    for completion in completions:
        assert completion.error is None, completion.error
    return [list(completion.token_ids) for completion in completions]
