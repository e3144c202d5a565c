"""The stage that really computes: a model's layers on a device of this machine."""

import logging
import time
from pathlib import Path

import torch

from pipemax.proto.config import EngineConfig
from pipemax.proto.errors import InvariantError
from pipemax.proto.messages.control import SweepSample
from pipemax.stage_worker.channels.ring import RingMemory
from pipemax.stage_worker.devices.cpu import CpuDevice
from pipemax.stage_worker.early_pool import EarlyPool
from pipemax.stage_worker.engine import WorkLoop
from pipemax.stage_worker.executor import Executor, Links
from pipemax.stage_worker.kv_end import MappedPool
from pipemax.stage_worker.model.load import load_stage_model
from pipemax.stage_worker.model_engine import ModelEngine
from pipemax.stage_worker.model_step import ModelStep
from pipemax.stage_worker.sampling.logits_exit import LogitsExit
from pipemax.stage_worker.state_clock import StateClock
from pipemax.stage_worker.step_queue import StepQueue
from pipemax.stage_worker.sweep import SweepLimits, sweep

log = logging.getLogger(__name__)


class _Laps:
    """What the parts of loading took, for the log."""

    def __init__(self) -> None:
        self._since_s = time.monotonic()
        self._parts: list[str] = []

    def end(self, what: str) -> None:
        now_s = time.monotonic()
        self._parts.append(f"{what} {now_s - self._since_s:.2f} s")
        self._since_s = now_s

    def __str__(self) -> str:
        return ", ".join(self._parts)


class TorchEngine(ModelEngine):
    """StageEngine for stage `stage`. Loads weights, KV pool and compiled kernels."""

    def __init__(self, config: EngineConfig, stage: int, early: EarlyPool | None = None) -> None:
        """`early`: this stage's pool, where somebody began with it before this module was there."""
        early = EarlyPool(config, stage) if early is None else early
        laps = _Laps()
        self._config = config
        self._device = CpuDevice()
        self._device.set_threads(config.threads_per_stage)
        self._model = load_stage_model(
            Path(config.model),
            stage=stage,
            layer_split=config.layer_split,
            dtype=config.dtype,
            block_size=config.block_size,
            load_format=config.load_format,
            fused_layers=config.fused_layers,
        )
        laps.end("weights")
        if self._model.geometry != early.geometry:
            raise InvariantError(f"a pool for {early.geometry} and {self._model.geometry} to run")
        self.num_blocks = early.num_blocks
        self._pool = self._device.view_pool(early.take(), early.geometry, self.num_blocks)
        self._model.bind_pool(self._pool.tensor)
        self._kv = MappedPool(self._pool.handle)
        laps.end("rest of the pool")
        self._model.warm_up()
        laps.end("kernels and a first step")
        log.info("loading took %s", laps)
        self._logits_exit: LogitsExit | None = None
        if self._logits_shape is not None:
            self._logits_exit = LogitsExit(self._logits_shape, config.sampler_workers)
            self.logits_place = self._logits_exit.place
        self._work = ModelStep(
            self._model,
            self._device,
            self.num_blocks,
            Path(config.model) / "tokenizer.json",
            self._logits_exit,
        )

    @property
    def ring_memory(self) -> RingMemory:
        return self._device

    def sweep(self, limit_s: float) -> tuple[SweepSample, ...]:
        """Takes `limit_s`."""
        model = self._model
        limits = SweepLimits.of(self._config, self.num_blocks)

        def rows(count: int) -> torch.Tensor | None:
            return None if model.is_first else torch.randn(count, model.hidden_size).to(model.dtype)

        return sweep(self._work, limits, model.vocab_size, rows, limit_s, time.perf_counter)

    def work_loop(self, queue: StepQueue, links: Links, clock: StateClock) -> WorkLoop:
        return Executor(queue, self._work, links, clock)

    def close(self) -> None:
        if self._logits_exit is not None:
            self._logits_exit.close()
        self._pool.close()
