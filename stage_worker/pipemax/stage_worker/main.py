"""One stage's process: put the parts together, then work until told to stop."""

import contextlib
import gc
import logging
import os
import secrets
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import zmq

from pipemax.proto import PROTOCOL_VERSION
from pipemax.proto.config import EngineConfig, load_config
from pipemax.proto.errors import ConfigError, ModelError
from pipemax.proto.messages.control import Failure, Hello, StageReady, SweepSample
from pipemax.proto.messages.registry import CONTROL, KV
from pipemax.proto.process import on_stop_signals
from pipemax.proto.sizes import format_size
from pipemax.stage_worker.channels.connect import Context, Neighbours, open_neighbours
from pipemax.stage_worker.channels.ring import RingShape
from pipemax.stage_worker.devices.base import Device, SharedTensor, pool_blocks
from pipemax.stage_worker.devices.registry import open_device
from pipemax.stage_worker.dtypes import dtype_name
from pipemax.stage_worker.executor import Executor
from pipemax.stage_worker.model.load import load_stage_model
from pipemax.stage_worker.model.stage_model import StageModel
from pipemax.stage_worker.model_step import ModelStep
from pipemax.stage_worker.shell import Peer, StageShell
from pipemax.stage_worker.state_clock import StateClock
from pipemax.stage_worker.step_queue import StepQueue
from pipemax.stage_worker.sweep import SweepLimits, sweep

FAILURE_LINGER_MS = 500
"""How long last words may take to reach the coordinator."""

log = logging.getLogger(__name__)


class StageFailedError(Exception):
    """A step could not be computed. Not a PipemaxError: a fresh process may do better, so the
    launcher is to start one."""


@dataclass(frozen=True, slots=True)
class LoadedStage:
    """All that a stage needs to compute, before it knows of any work."""

    model: StageModel
    device: Device
    pool: SharedTensor
    neighbours: Neighbours
    load_s: float

    def close(self) -> None:
        self.neighbours.close()
        self.pool.close()


def body(run_dir: Path, index: int) -> None:
    """Runs stage `index`. Returns after SIGTERM or Stop; raises ConfigError or ModelError when no
    restart would help, StageFailedError when one might."""
    on_stop_signals(lambda: sys.exit(0))  # while loading there is nothing to finish
    config = load_config(run_dir)
    with contextlib.ExitStack() as stack:
        context: Context = zmq.Context()
        stack.callback(context.destroy)
        control = Peer(context, run_dir, CONTROL, index)
        stack.enter_context(_last_words(control))
        hello = _hello(index)
        control.send(hello)
        stage = _load(context, config, run_dir, index)
        stack.callback(stage.close)
        queue = StepQueue(takes_activations=stage.neighbours.previous is not None)
        work = ModelStep(stage.model, stage.device, num_blocks=len(stage.pool.tensor))
        samples = _sweep(config, stage, work)
        clock = StateClock(time.monotonic_ns)  # loading is over; it is told as `load_s`
        shell = StageShell(
            control,
            Peer(context, run_dir, KV, index),
            hello=hello,
            ready=_ready(index, stage, samples),
            pool=stage.pool,
            neighbours=stage.neighbours,
            queue=queue,
            clock=clock,
        )
        on_stop_signals(shell.stop)
        gc.freeze()  # what was loaded stays; collections look at steps only
        Executor(queue, work, shell, clock).run()


def _hello(index: int) -> Hello:
    return Hello(
        protocol=PROTOCOL_VERSION,
        role="stage",
        index=index,
        pid=os.getpid(),
        incarnation=secrets.token_hex(8),
    )


def _load(context: Context, config: EngineConfig, run_dir: Path, index: int) -> LoadedStage:
    """Weights, KV pool, compiled kernels and open channels."""
    started_s = time.monotonic()
    device = open_device(config.device)
    device.set_threads(config.threads_per_stage)
    model = load_stage_model(
        Path(config.model),
        stage=index,
        layer_split=config.layer_split,
        dtype=config.dtype,
        block_size=config.block_size,
    )
    num_blocks = pool_blocks(model.geometry, config.kv_cache_memory_bytes, index)
    pool = device.allocate_pool(model.geometry, num_blocks)
    model.bind_pool(pool.tensor)
    model.warm_up()
    shape = RingShape(
        num_slots=config.num_slots,
        max_rows=config.max_num_batched_tokens,
        hidden_size=model.hidden_size,
        dtype=dtype_name(model.dtype),
    )
    neighbours = open_neighbours(context, config, run_dir, stage=index, device=device, shape=shape)
    return LoadedStage(model, device, pool, neighbours, time.monotonic() - started_s)


def _sweep(config: EngineConfig, stage: LoadedStage, work: ModelStep) -> tuple[SweepSample, ...]:
    model = stage.model
    limits = SweepLimits(
        config.max_num_seqs,
        config.max_num_batched_tokens,
        config.max_model_len,
        len(stage.pool.tensor),
        config.block_size,
    )

    def rows(count: int) -> torch.Tensor | None:
        return None if model.is_first else torch.randn(count, model.hidden_size).to(model.dtype)

    started_s = time.monotonic()
    samples = sweep(work, limits, model.vocab_size, rows, config.warm_up_s, time.perf_counter)
    if samples:
        log.info("timed %d steps in %.2f s", len(samples), time.monotonic() - started_s)
    return samples


def _ready(index: int, stage: LoadedStage, samples: tuple[SweepSample, ...]) -> StageReady:
    model = stage.model
    ready = StageReady(
        stage=index,
        layers=model.layers,
        num_blocks=len(stage.pool.tensor),
        block_bytes=model.geometry.block_bytes,
        weights_bytes=model.weights_bytes,
        load_s=stage.load_s,
        activation_transport=stage.neighbours.transport,
        sweep=samples,
    )
    log.info(
        "layers [%d, %d), weights %s, %d KV blocks of %s, loaded in %.1f s",
        *model.layers,
        format_size(model.weights_bytes),
        ready.num_blocks,
        format_size(ready.block_bytes),
        stage.load_s,
    )
    return ready


@contextlib.contextmanager
def _last_words(control: Peer) -> Iterator[None]:
    """Tells the coordinator why this process ends when it ends by an exception."""
    try:
        yield
    except Exception as error:
        line = " ".join(f"{type(error).__name__}: {error}".split())
        control.socket.setsockopt(zmq.LINGER, FAILURE_LINGER_MS)
        control.send(Failure(error=line[:4000]))
        if isinstance(error, ConfigError | ModelError):
            raise
        raise StageFailedError(line) from error
