"""A sampler worker's process: its sockets and its work loop."""

import contextlib
import gc
import logging
import math
import os
import secrets
import sys
import time
from pathlib import Path

import torch
import zmq

from pipemax.proto import PROTOCOL_VERSION
from pipemax.proto.config import load_config
from pipemax.proto.messages.control import (
    Beat,
    Hello,
    Reset,
    ResetDone,
    SamplerReady,
    Stop,
    Welcome,
)
from pipemax.proto.messages.logits import LogitsAccepted, LogitsOffer, LogitsReady
from pipemax.proto.messages.registry import CONTROL, LOGITS
from pipemax.proto.process import on_stop_signals
from pipemax.proto.rundir import socket_endpoint
from pipemax.proto.sockets import bind_router, identity_of
from pipemax.proto.wire import Codec, encode, single_frame
from pipemax.stage_worker.peer import Context, Peer, last_words
from pipemax.stage_worker.sampling.sampler import Sampler
from pipemax.stage_worker.sampling.worker import SamplerWorker

TICK_S = 0.5
"""Between beats; also the longest wait before a stop signal is noticed."""

log = logging.getLogger(__name__)


def body(run_dir: Path, index: int) -> None:
    """Runs sampler `index`. Returns after SIGTERM or Stop; raises ConfigError when no restart would
    help, WorkFailedError when one might."""
    on_stop_signals(lambda: sys.exit(0))
    config = load_config(run_dir)
    torch.set_num_threads(1)  # samplers side by side are the way to more cores
    with contextlib.ExitStack() as stack:
        context: Context = zmq.Context()
        stack.callback(context.destroy)
        control = Peer(context, run_dir, CONTROL, identity_of("sampler", index))
        stack.enter_context(last_words(control))
        logits = bind_router(context, socket_endpoint(run_dir, f"logits-{index}"), LOGITS)
        worker = SamplerWorker(Sampler(Path(config.model) / "tokenizer.json"))
        stack.callback(worker.close)
        stage = identity_of("stage", config.pipeline_parallel_size - 1)
        shell = SamplerShell(control, logits, stage, worker, index)
        on_stop_signals(shell.stop)
        gc.freeze()
        shell.run()


class SamplerShell:
    """Feeds the worker what the coordinator and the last stage say, one message at a time."""

    def __init__(
        self,
        control: Peer,
        logits: "zmq.Socket[bytes]",
        stage: bytes,
        worker: SamplerWorker,
        index: int,
    ) -> None:
        """`stage`: identity of the only process that may send logits."""
        self._control = control
        self._logits = logits
        self._stage = stage
        self._worker = worker
        self._index = index
        self._codec = Codec(LOGITS, at_binder=True)
        self._hello = Hello(
            protocol=PROTOCOL_VERSION,
            role="sampler",
            index=index,
            pid=os.getpid(),
            incarnation=secrets.token_hex(8),
        )
        self._instance_id: str | None = None
        self._stopping = False
        self._started_s = time.monotonic()
        self._sampling_s = 0.0
        self._next_tick_s = 0.0

    def stop(self) -> None:
        """Ends the work loop within a tick. May be called from a signal handler."""
        self._stopping = True

    def run(self) -> None:
        """Control first: what it says may void the rest."""
        poller = zmq.Poller()
        poller.register(self._control.socket, zmq.POLLIN)
        poller.register(self._logits, zmq.POLLIN)
        while not self._stopping:
            if time.monotonic() >= self._next_tick_s:
                self._next_tick_s = time.monotonic() + TICK_S
                self._tick()
            wait_s = max(0.0, self._next_tick_s - time.monotonic())
            ready = dict(poller.poll(math.ceil(wait_s * 1e3)))
            if self._control.socket in ready:
                self._on_control()
            elif self._logits in ready:
                self._on_logits()

    def _tick(self) -> None:
        self._control.send(self._hello)  # a restarted coordinator learns of us by it
        if self._instance_id is not None:
            waiting_s = time.monotonic() - self._started_s - self._sampling_s
            states = {"sample": self._sampling_s, "wait": max(0.0, waiting_s)}
            self._control.send(Beat(state_seconds=states))

    def _on_control(self) -> None:
        while (message := self._control.receive()) is not None:
            if isinstance(message, Reset):
                self._on_reset(message)
            elif isinstance(message, Welcome):
                self._on_welcome(message)
            elif isinstance(message, Stop):
                self._stopping = True

    def _on_welcome(self, welcome: Welcome) -> None:
        """Another coordinator than before knows nothing of us, and counts its epochs anew."""
        if welcome.instance_id == self._instance_id:
            return
        if self._instance_id is not None:
            log.info("a new coordinator, instance %s", welcome.instance_id)
            self._worker.reset(-1)
        self._instance_id = welcome.instance_id
        self._control.send(SamplerReady(sampler=self._index))

    def _on_reset(self, reset: Reset) -> None:
        if reset.epoch <= self._worker.epoch:
            return
        log.info("reset to epoch %d", reset.epoch)
        self._answer(self._worker.reset(reset.epoch))
        self._control.send(ResetDone(epoch=reset.epoch))

    def _on_logits(self) -> None:
        identity, *frames = self._logits.recv_multipart(zmq.DONTWAIT)
        if identity != self._stage:
            log.warning("ignored a message of %r, which does not send here", identity)
            return
        message = self._codec.decode(single_frame(frames, LOGITS))
        if isinstance(message, LogitsOffer):
            self._answer(self._worker.offered(message))
        elif isinstance(message, LogitsReady):
            began_s = time.monotonic()
            sampled = self._worker.sample(message)
            if sampled is not None:
                self._control.send(sampled)
            self._sampling_s += time.monotonic() - began_s

    def _answer(self, accepted: LogitsAccepted | None) -> None:
        if accepted is not None:
            with contextlib.suppress(zmq.ZMQError):  # it offers again when it is back
                self._logits.send_multipart([self._stage, encode(accepted)], zmq.DONTWAIT)
