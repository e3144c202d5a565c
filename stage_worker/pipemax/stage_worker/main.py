"""One stage's process: put the parts together, then work until told to stop."""

import contextlib
import gc
import logging
import os
import secrets
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import zmq

from pipemax.proto import PROTOCOL_VERSION
from pipemax.proto.config import EngineConfig, load_config
from pipemax.proto.messages.control import Hello, StageReady, SweepSample
from pipemax.proto.messages.registry import CONTROL, KV, REPORTS
from pipemax.proto.process import on_stop_signals
from pipemax.proto.sizes import format_size
from pipemax.proto.sockets import identity_of
from pipemax.stage_worker.channels.connect import Neighbours, open_neighbours
from pipemax.stage_worker.cores import pin_to_share
from pipemax.stage_worker.engine import StageEngine, WrongKvError, open_engine
from pipemax.stage_worker.peer import Context, Peer, last_words
from pipemax.stage_worker.shell import StageShell
from pipemax.stage_worker.state_clock import StateClock
from pipemax.stage_worker.step_queue import StepQueue

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadedStage:
    """All that a stage needs to compute, before it knows of any work."""

    engine: StageEngine
    neighbours: Neighbours
    load_s: float


def body(run_dir: Path, index: int) -> None:
    """Runs stage `index`. Returns after SIGTERM or Stop; raises ConfigError, ModelError or
    WrongKvError when no restart would help, WorkFailedError when one might."""
    on_stop_signals(lambda: sys.exit(0))  # while loading there is nothing to finish
    config = load_config(run_dir)
    with contextlib.ExitStack() as stack:
        context: Context = zmq.Context()
        stack.callback(context.destroy)
        identity = identity_of("stage", index)
        control = Peer(context, run_dir, CONTROL, identity)
        stack.enter_context(last_words(control, WrongKvError))
        hello = _hello(index)
        control.send(hello)
        if config.pin_cores:  # what moves messages has begun by now, and may run anywhere
            pin_to_share(index, config.pipeline_parallel_size, config.threads_per_stage)
        stage = _load(stack, context, config, run_dir, index)
        queue = StepQueue(takes_activations=stage.neighbours.previous is not None)
        samples = _sweep(config, stage.engine)
        is_last = index == config.pipeline_parallel_size - 1
        clock = StateClock(time.monotonic_ns)  # loading is over; it is told as `load_s`
        shell = StageShell(
            control,
            # The last one brings tokens; and what one stage says stays in order, by one socket.
            control if is_last else Peer(context, run_dir, REPORTS, identity),
            Peer(context, run_dir, KV, identity),
            hello=hello,
            ready=_ready(index, stage, samples),
            pool=stage.engine.kv,
            neighbours=stage.neighbours,
            queue=queue,
            clock=clock,
            spin_wait_s=config.spin_wait_s,
        )
        on_stop_signals(shell.stop)
        gc.freeze()  # what was loaded stays; collections look at steps only
        stage.engine.work_loop(queue, shell, clock).run()


def _hello(index: int) -> Hello:
    return Hello(
        protocol=PROTOCOL_VERSION,
        role="stage",
        index=index,
        pid=os.getpid(),
        incarnation=secrets.token_hex(8),
    )


def _load(
    stack: contextlib.ExitStack, context: Context, config: EngineConfig, run_dir: Path, index: int
) -> LoadedStage:
    """Engine and open channels; closed with `stack`."""
    started_s = time.monotonic()
    engine = open_engine(config, index, run_dir)
    stack.callback(engine.close)
    neighbours = open_neighbours(
        context,
        config,
        run_dir,
        stage=index,
        memory=engine.ring_memory,
        shape=engine.ring_shape,
        logits=engine.logits_place,
    )
    stack.callback(neighbours.close)
    return LoadedStage(engine, neighbours, time.monotonic() - started_s)


def _sweep(config: EngineConfig, engine: StageEngine) -> tuple[SweepSample, ...]:
    started_s = time.monotonic()
    samples = engine.sweep(config.warm_up_s)
    if samples:
        log.info("timed %d steps in %.2f s", len(samples), time.monotonic() - started_s)
    return samples


def _ready(index: int, stage: LoadedStage, samples: tuple[SweepSample, ...]) -> StageReady:
    engine = stage.engine
    ready = StageReady(
        stage=index,
        layers=engine.layers,
        num_blocks=engine.num_blocks,
        block_bytes=engine.block_bytes,
        weights_bytes=engine.weights_bytes,
        load_s=stage.load_s,
        activation_transport=stage.neighbours.transport,
        sweep=samples,
    )
    log.info(
        "layers [%d, %d), weights %s, %d KV blocks of %s, loaded in %.1f s",
        *engine.layers,
        format_size(engine.weights_bytes),
        ready.num_blocks,
        format_size(ready.block_bytes),
        stage.load_s,
    )
    return ready
