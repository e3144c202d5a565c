"""What a stage computes with, whatever the device: the seam between the process and the numerics.

`torch_engine` runs a real model on the CPU, `devices.cuda.engine` on a GPU; `modelled.engine` waits
as long as one would take. Imports none of them: a stage that only models its GPU starts without
torch, fast and small.
"""

import contextlib
import gc
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from pipemax.proto.config import EngineConfig
from pipemax.proto.errors import ConfigError, InvariantError
from pipemax.proto.messages.control import SweepSample
from pipemax.proto.sizes import format_size
from pipemax.stage_worker.channels.logits import LogitsPlace
from pipemax.stage_worker.channels.ring import RingMemory, RingShape
from pipemax.stage_worker.executor import Links
from pipemax.stage_worker.kv_end import KvEnd
from pipemax.stage_worker.state_clock import StateClock
from pipemax.stage_worker.step_queue import StepQueue

log = logging.getLogger(__name__)


class WrongKvError(InvariantError):
    """A block that a step was to read holds something else, says an engine that can tell. Computing
    on would give wrong tokens, and a fresh start would hide who brought the block there."""


class WorkLoop(Protocol):
    def run(self) -> None:
        """Runs steps until told to stop; whatever a step raises ends the loop."""


class StageEngine(Protocol):
    """A stage's layers and its KV pool, ready to run steps."""

    @property
    def layers(self) -> tuple[int, int]:
        """[first, last + 1) of the model's layers."""

    @property
    def weights_bytes(self) -> int: ...

    @property
    def num_blocks(self) -> int:
        """Of the KV pool."""

    @property
    def block_bytes(self) -> int:
        """What moving one block costs the stage's link."""

    @property
    def kv(self) -> KvEnd:
        """The KV pool, for the daemon."""

    @property
    def ring_shape(self) -> RingShape:
        """Of the activations this stage takes and gives."""

    @property
    def ring_memory(self) -> RingMemory: ...

    @property
    def logits_place(self) -> LogitsPlace | None:
        """Where samplers find logits; None where they get none of this stage."""

    def sweep(self, limit_s: float) -> tuple[SweepSample, ...]:
        """The warm-up sweep; 0 makes none. Only before the first step."""

    def work_loop(self, queue: StepQueue, links: Links, clock: StateClock) -> WorkLoop:
        """What runs the steps of `queue`. `clock` is the stage's."""

    def close(self) -> None: ...


def open_engine(config: EngineConfig, stage: int, run_dir: Path | None = None) -> StageEngine:
    """Loads the stage. `run_dir`: of the system it belongs to; None for one that is only measured.
    Raises ConfigError or ModelError for what cannot work."""
    with _no_garbage_collection():
        return _open_engine(config, stage, run_dir)


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Importing makes millions of objects and drops few: to look for garbage among them takes a
    quarter of its time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _open_engine(config: EngineConfig, stage: int, run_dir: Path | None) -> StageEngine:
    if config.device == "cuda":
        from pipemax.stage_worker.devices.cuda.engine import CudaEngine

        return CudaEngine(config, stage, run_dir)
    if config.device == "modelled":
        from pipemax.stage_worker.modelled.engine import ModelledEngine

        return ModelledEngine(config, stage)
    from pipemax.stage_worker.early_pool import EarlyPool

    pool = EarlyPool(config, stage)
    started_s = time.monotonic()
    from pipemax.stage_worker.torch_engine import TorchEngine

    log.info("imports took %.2f s", time.monotonic() - started_s)
    return TorchEngine(config, stage, pool)


def pool_blocks(block_bytes: int, block_size: int, budget_bytes: int, stage: int) -> int:
    """Blocks that `budget_bytes` of device memory hold; raises ConfigError when it is none."""
    num_blocks = budget_bytes // block_bytes
    if num_blocks == 0:
        raise ConfigError(
            f"--kv-cache-memory-bytes {format_size(budget_bytes)} holds no KV block: one block of "
            f"{block_size} tokens on stage {stage} takes {block_bytes} bytes "
            f"({format_size(block_bytes)}); give at least that, better a thousand times"
        )
    return num_blocks
