"""The KV daemon's shell: sockets, timers and signals around the core."""

import contextlib
import logging
import math
import os
import time
from pathlib import Path

import zmq

from pipemax.kv_daemon.copy_recorder import CopyRecorder
from pipemax.kv_daemon.core import KvCore
from pipemax.kv_daemon.engine import CopyEngine
from pipemax.kv_daemon.events import (
    Command,
    CopyDone,
    Event,
    FromStage,
    LayOutHost,
    MapPool,
    NewCoordinator,
    SendToCoordinator,
    SendToStage,
    StartCopy,
)
from pipemax.kv_daemon.host_pool import HostPool
from pipemax.kv_daemon.pages import PoolPages
from pipemax.kv_daemon.regions import GpuHost, RegionDesk, nodes_near
from pipemax.proto import PROTOCOL_VERSION
from pipemax.proto.errors import PipemaxSystemError, WireError
from pipemax.proto.messages import control, kv
from pipemax.proto.messages.registry import CONTROL, KV
from pipemax.proto.messages.spans import RecordSpans
from pipemax.proto.messages.types import Message
from pipemax.proto.rundir import socket_endpoint
from pipemax.proto.sockets import bind_router, connect_dealer, identity_of, region_identity
from pipemax.proto.wire import Codec, encode, single_frame

HELLO_INTERVAL_S = 1.0
"""Also after the Welcome: a restarted coordinator learns of us by it."""
BEAT_INTERVAL_S = 0.5
REPORT_INTERVAL_S = 0.1
"""At most one KvReport in this time, however much was done."""
BUSY_REPORT_INTERVAL_S = 1.0
FAREWELL_MS = 500
"""How long the sockets may take to deliver the last words."""
BATCH_MESSAGES = 256
"""Messages read from one socket before the other sources get their turn."""

log = logging.getLogger(__name__)


class Shell:
    """Feeds the core and carries out its commands. One thread; it only ever waits in `poll`."""

    def __init__(
        self,
        run_dir: Path,
        num_stages: int,
        core: KvCore,
        engine: CopyEngine,
        pool: HostPool,
        incarnation: str,
        gpus: GpuHost | None = None,
    ) -> None:
        self._core = core
        self._engine = engine
        self._pool = pool
        self._incarnation = incarnation
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._stages = bind_router(self._context, socket_endpoint(run_dir, "kv"), KV)
        self._control = connect_dealer(
            self._context, socket_endpoint(run_dir, "control"), CONTROL, identity_of("kv_daemon")
        )
        self._stage_of = {identity_of("stage", stage): stage for stage in range(num_stages)}
        self._identity_of = {stage: name for name, stage in self._stage_of.items()}
        self._stage_codec = Codec(KV, at_binder=True)
        self._control_codec = Codec(CONTROL, at_binder=False)
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._stopping = False
        parts = ((0, pool.size_bytes),) if gpus is None else gpus.parts
        finish = None if gpus is None else gpus.finish
        self._pages = PoolPages(pool, parts, self._wake_fd, finish)
        self._gpus = gpus
        self._desk = RegionDesk(self._pages, engine, nodes_near())
        self._region_of = {region_identity(stage): stage for stage in range(num_stages)}
        self._coordinator: str | None = None
        """instance_id of the coordinator that welcomed us."""
        self._ready_told: str | None = None
        """The instance_id that knows our pool is ready."""
        self._hello_at = self._beat_at = self._report_at = 0.0
        self._spans = CopyRecorder()
        self._worked = False
        """Something happened since the last KvReport."""

    def stop(self) -> None:
        """Makes `run` return. May be called from a signal handler."""
        self._stopping = True
        self._wake()

    def run(self) -> None:
        """Works until told to stop. Raises what the core or a copy raised, after telling the
        coordinator."""
        try:
            if self._gpus is None:
                self._pages.touch(0)
            else:
                self._desk.begin(len(self._identity_of), self._gpus.pci_bus_ids)
            while not self._stopping:
                self._turn(self._tick(time.monotonic()))
        except Exception as error:
            text = " ".join(str(error).split())
            self._tell_coordinator(control.Failure(error=text[:4000]))
            raise

    def close(self) -> None:
        """Releases the sockets; the engine and the pool are the caller's."""
        self._pages.close()
        self._stages.close(linger=0)
        self._control.close(linger=FAREWELL_MS)
        self._context.term()
        os.close(self._wake_fd)

    # Waiting.

    def _turn(self, timeout_s: float) -> None:
        """Waits for something to happen and sees to all that did, copies first: their lanes idle
        until then."""
        poller = zmq.Poller()
        for source in (self._engine.fileno(), self._wake_fd, self._stages, self._control):
            poller.register(source, zmq.POLLIN)
        poller.poll(max(0, math.ceil(timeout_s * 1000)))
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake_fd)
        self._feed_ends()
        for _ in range(BATCH_MESSAGES):
            if not self._read_stage():
                break
        self._feed_ends()
        for stage, answer in self._desk.answers():
            self._send(region_identity(stage), answer)
        for _ in range(BATCH_MESSAGES):
            if self._stopping or not self._read_coordinator():
                break

    def _tick(self, now: float) -> float:
        """Says what is due; returns the seconds until something is due again."""
        if now >= self._hello_at:
            self._hello_at = now + HELLO_INTERVAL_S
            self._say_hello()
        if self._coordinator is None:
            return self._hello_at - now
        if self._ready_told != self._coordinator and self._pages.all_there:
            self._ready_told = self._coordinator
            self._say_ready()
        if now >= self._beat_at:
            self._beat_at = now + BEAT_INTERVAL_S
            self._tell_coordinator(control.Beat())
            if (spans := self._spans.take()) is not None:
                self._tell_coordinator(spans)
        if not (self._worked or self._core.busy):
            return min(self._beat_at, self._hello_at) - now
        pause = REPORT_INTERVAL_S if self._worked else BUSY_REPORT_INTERVAL_S
        if now >= self._report_at + pause:
            self._report(now)
            pause = BUSY_REPORT_INTERVAL_S
        return min(self._beat_at, self._hello_at, self._report_at + pause) - now

    def _wake(self) -> None:
        os.eventfd_write(self._wake_fd, 1)

    # The core.

    def _feed_ends(self) -> None:
        for stage, direction in self._engine.completed():
            self._spans.ended(stage, direction, time.monotonic_ns())
            self._feed(CopyDone(stage, direction))

    def _feed(self, event: Event) -> None:
        commands = self._core.handle(event, time.monotonic())
        # Stages say it of every step: where nothing waited for it, there is nothing to report.
        is_idle_step = isinstance(event, FromStage) and not commands
        self._worked = self._worked or not is_idle_step
        for command in commands:
            self._obey(command)

    def _obey(self, command: Command) -> None:
        match command:
            case SendToStage():
                self._tell_stage(command.stage, command.message)
            case StartCopy():
                self._spans.started(command, time.monotonic_ns())
                order = self._engine.start(command)
                if order is not None:
                    self._tell_stage(command.stage, order)
            case SendToCoordinator():
                self._tell_coordinator(command.message)
            case MapPool():
                self._map_pool(command.offer)
            case LayOutHost():
                held_bytes = self._engine.held_bytes(command.block_bytes)
                regions = self._pool.regions(command.num_blocks, held_bytes)
                self._engine.lay_out(regions)

    def _map_pool(self, offer: kv.AttachPool) -> None:
        try:
            mapped = self._engine.map_pool(offer)
        except PipemaxSystemError as error:
            log.warning("stage %d's pool was not attached: %s", offer.stage, error)
            return
        log.info(
            "attached stage %d for epoch %d: %d blocks of %d bytes",
            offer.stage,
            offer.epoch,
            offer.num_blocks,
            offer.block_bytes,
        )
        self._spans.block_bytes[offer.stage] = offer.block_bytes
        self._feed(mapped)

    # Stages.

    def _read_stage(self) -> bool:
        """Handles one message; says whether there was one. A bad one costs only itself."""
        try:
            sender, *frames = self._stages.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return False
        stage = self._stage_of.get(sender, self._region_of.get(sender))
        if stage is None:
            log.warning("message from %r on the kv socket, which is no stage", sender[:40])
            return True
        try:
            message = self._stage_codec.decode(single_frame(frames, KV))
        except WireError as error:
            log.warning("bad message from stage %d: %s", stage, error)
            return True
        try:
            self._on_stage_message(stage, message)
        except WireError as error:
            log.warning("message of stage %d: %s", stage, error)
        return True

    def _on_stage_message(self, stage: int, message: Message) -> None:
        """Raises WireError for what a stage of this system does not say."""
        match message:
            case kv.AttachPool() | kv.AskHostRegion() if message.stage != stage:
                name = type(message).__name__
                raise WireError("unexpected", f"{name} as stage {message.stage}")
            case kv.AttachPool() | kv.Computed():
                self._feed(FromStage(stage, message))
            case kv.CopyEnded():
                self._engine.copy_ended(stage, message)
            case kv.AskHostRegion() if self._gpus is None:
                raise WireError("unexpected", "it asks for a host region, and is on no GPU")
            case kv.AskHostRegion():
                self._desk.ask(message)

    def _tell_stage(self, stage: int, message: Message) -> None:
        self._send(self._identity_of[stage], message)

    def _send(self, identity: bytes, message: Message) -> None:
        try:
            self._stages.send_multipart([identity, encode(message)], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            # It has gone, or is about to: its successor attaches in a new epoch.
            name = type(message).__name__
            log.info("%s did not get %s: %s", identity.decode(), name, error)

    # The coordinator.

    def _read_coordinator(self) -> bool:
        """Handles one message; says whether there was one."""
        try:
            frames = self._control.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return False
        try:
            message = self._control_codec.decode(single_frame(frames, CONTROL))
        except WireError as error:
            log.warning("bad message from the coordinator: %s", error)
            return True
        match message:
            case control.Welcome():
                self._on_welcome(message)
            case control.Stop():
                self._stopping = True
            case RecordSpans():
                self._spans.record_until(time.monotonic_ns() + round(message.seconds * 1e9))
            case (
                control.Reset()
                | control.Prefetch()
                | control.Store()
                | control.Drop()
                | control.Release()
            ):
                self._feed(message)
            case _:
                log.warning("%s is not for the KV daemon", type(message).__name__)
        return True

    def _on_welcome(self, welcome: control.Welcome) -> None:
        if self._coordinator not in (None, welcome.instance_id):
            log.info("a new coordinator, instance %s", welcome.instance_id)
            self._feed(NewCoordinator())
        self._coordinator = welcome.instance_id

    def _say_hello(self) -> None:
        hello = control.Hello(
            protocol=PROTOCOL_VERSION,
            role="kv_daemon",
            pid=os.getpid(),
            incarnation=self._incarnation,
        )
        self._tell_coordinator(hello)

    def _say_ready(self) -> None:
        context_bytes = () if self._gpus is None else self._gpus.context_bytes()
        ready = control.KvReady(pool_bytes=self._core.host_bytes, context_bytes=context_bytes)
        self._tell_coordinator(ready)

    def _report(self, now: float) -> None:
        self._report_at = now
        self._worked = False
        report = control.KvReport(
            host_blocks_total=self._core.host_blocks_total,
            host_blocks_used=self._core.host_blocks_used,
            links=self._engine.totals(),
            queued_load_bytes=self._core.queued_load_bytes(),
        )
        self._tell_coordinator(report)

    def _tell_coordinator(self, message: Message) -> None:
        try:
            self._control.send(encode(message), zmq.NOBLOCK)
        except zmq.Again:
            log.warning("the coordinator has not read for long; dropped %s", type(message).__name__)
