"""The coordinator process: feeds sockets into the cores and carries out what they answer."""

import hashlib
import logging
import time
import uuid
from collections.abc import Iterable
from pathlib import Path

import zmq

from pipemax.coordinator.assembly import (
    Action,
    Assembly,
    ResetAll,
    stage_name,
)
from pipemax.coordinator.capacity import check_capacity
from pipemax.coordinator.client_desk import ClientDesk
from pipemax.coordinator.control_link import LAUNCHER, ControlLink
from pipemax.coordinator.core import Scheduler
from pipemax.coordinator.doors import Doors
from pipemax.coordinator.events import (
    BlocksStored,
    Cancelled,
    Event,
    FinishRequest,
    KvReleased,
    LinkMeasured,
    Paused,
    Resumed,
    StageComputed,
    ToDaemon,
    ToStages,
)
from pipemax.coordinator.garbage import Garbage
from pipemax.coordinator.job_eta import JobEta
from pipemax.coordinator.jobs import JobLimits, Jobs
from pipemax.coordinator.journal import JournalLimits
from pipemax.coordinator.journal_file import journal_path
from pipemax.coordinator.live_spans import LiveSpans
from pipemax.coordinator.liveness import Liveness
from pipemax.coordinator.metrics import Metrics
from pipemax.coordinator.phases import make_prefill
from pipemax.coordinator.policy import make_policy
from pipemax.coordinator.sessions import Sessions
from pipemax.coordinator.span_watch import SpanWatch
from pipemax.coordinator.state import SchedulerLimits
from pipemax.coordinator.status import StatusView
from pipemax.coordinator.step_parts import StepParts, WholeStep, hand_out
from pipemax.coordinator.text.processor import TextProcessor
from pipemax.proto import PROTOCOL_VERSION
from pipemax.proto.config import EngineConfig
from pipemax.proto.errors import ConfigError
from pipemax.proto.messages import control, ingest, spans
from pipemax.proto.messages.types import Message

log = logging.getLogger(__name__)

IDLE_POLL_MS = 200
JOB_SLICE_S = 0.002
"""CPU time for tokenising the requests of jobs, in each round of the loop; see INGEST_SLICE_S."""
SNAPSHOT_INTERVAL_S = 0.2
LOOK_INTERVAL_S = 0.01
"""Between looks at what the clock alone brings. A round serves one message, often."""


class CoordinatorShell:
    """One thread, one poll loop. Control messages go first: they keep the pipeline full."""

    def __init__(self, config: EngineConfig, run_dir: Path, text: TextProcessor) -> None:
        self._config = config
        self._instance_id = uuid.uuid4().hex
        self._scheduler = Scheduler(
            SchedulerLimits(
                block_size=config.block_size,
                num_slots=config.num_slots,
                max_num_seqs=config.max_num_seqs,
                max_num_batched_tokens=config.max_num_batched_tokens,
                max_model_len=config.max_model_len,
                eos_token_ids=text.eos_token_ids,
                share_prefixes=config.enable_prefix_caching,
            ),
            make_policy(config.policy),
            make_prefill(config.prefill, config.num_slots),
        )
        self._assembly = Assembly(config.pipeline_parallel_size, config.sampler_workers)
        self._parts = StepParts()
        self._liveness = Liveness(config.hung_after_s)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._control = ControlLink(self._context, config, run_dir)
        self._doors = Doors(self._context, config, run_dir)
        self._sessions = Sessions(config, text, self._doors.send)
        self._jobs = Jobs(
            journal_path(config.name),
            _settings_of(config),
            config.served_model_name,
            JobLimits(
                most_running=config.client_credits,
                most_waiting=config.max_num_seqs * config.num_slots,
                journal=JournalLimits(max_jobs=config.max_jobs, max_bytes=config.max_journal_bytes),
            ),
            lambda job, submit: self._sessions.accept_for_job(job, submit, time.monotonic()),
        )
        self._view = StatusView(config, self._instance_id, self._scheduler.state, self._assembly)
        self.metrics = Metrics(config.served_model_name, lambda: self._view.latest)
        self._launcher = False
        self._drained = False
        self._stopping = False
        self._next_snapshot = 0.0
        self._next_look = 0.0
        self._garbage = Garbage(time.monotonic())
        self.live_spans = LiveSpans()
        self._spans = SpanWatch(self._control.to_all, self._doors.send, self.live_spans)
        self._job_eta = JobEta()
        self._clients = ClientDesk(
            self._doors,
            self._server_hello(),
            self._sessions,
            self._jobs,
            self._spans,
            self._view.refresh,
            self._tell,
            self._cancel,
        )

    def stop(self) -> None:
        """End the loop; safe from a signal handler."""
        self._stopping = True

    def latest_status(self) -> ingest.Status | None:
        """The last snapshot; from any thread."""
        return self._view.latest

    def run(self) -> None:
        """Serve until stopped. Raises PipemaxError when the system cannot work as configured."""
        stopped = False
        urgent, reports = self._control.socket, self._control.reports
        more = False
        try:
            self._doors.open()
            while_busy, while_idle = self._poller(urgent), self._poller(urgent, reports)
            self._jobs.open()
            while not self._stopping:
                poller = while_busy if self._scheduler.state.in_flight else while_idle
                polled_at = time.monotonic()
                ready = poller.poll(0 if more or self._jobs.has_work else IDLE_POLL_MS)
                self._view.waited(time.monotonic() - polled_at)
                told = {socket for socket, _ in ready}
                clients_wait = bool(told - {urgent, reports})
                if urgent in told or not clients_wait:
                    self._receive_control()
                if more or clients_wait:
                    more = self._clients.receive()
                self._serve_jobs()
                self._finish_round()
            stopped = True
        except ConfigError:
            stopped = True  # no request is to blame
            raise
        finally:
            self._jobs.close(clean=stopped)
            self._doors.close()
            self._context.destroy(linger=200)

    def _poller(self, *control: "zmq.Socket[bytes]") -> zmq.Poller:
        """Waits for clients and for these."""
        poller = zmq.Poller()
        for socket in control:
            poller.register(socket, zmq.POLLIN)
        self._doors.register(poller)
        return poller

    # Control

    def _receive_control(self) -> None:
        """Reports first: what is planned is to know them."""
        for identity, message in self._control.receive_reports():
            if not self._is_late(identity, message):
                self._on_control(identity, message)
                self._heard(identity)
        for identity, message in self._control.receive():
            self._on_control(identity, message)
            self._heard(identity)

    def _is_late(self, identity: bytes, report: Message) -> bool:
        """A Hello of a process that was replaced meanwhile: its successor's first comes by another
        socket, and may have been faster."""
        if not isinstance(report, control.Hello) or identity not in self._control.names:
            return False
        known = self._assembly.peers[self._control.names[identity]].incarnation
        return known not in (None, report.incarnation)

    def _heard(self, identity: bytes) -> None:
        """A process that is ready beats from its work loop; one that loads does not."""
        name = self._control.names.get(identity)
        if name is None:
            return
        if self._assembly.peers[name].ready is None:
            self._liveness.forget(name)
        else:
            self._liveness.heard(name, time.monotonic())

    def _on_control(self, identity: bytes, message: Message) -> None:
        match message:
            case control.Hello():
                self._on_hello(identity, message)
            case control.Drain() if identity == LAUNCHER:
                self._drain()
            case _ if identity not in self._control.names:
                log.error("control message of unknown process %r", identity)
            case control.StepDone() if self._control.names[identity] == stage_name(message.stage):
                self._on_step_done(message)
            case control.RowsSampled() if self._is_current(message.epoch):
                self._view.rows_sampled(self._control.names[identity], len(message.rows) // 4)
                self._step_returned(message.step, self._parts.rows_sampled(message))
            case control.Beat():
                self._view.stage_seconds(self._control.names[identity], message.state_seconds)
            case control.StageReady() | control.SamplerReady() | control.KvReady():
                self._act(self._assembly.ready(self._control.names[identity], message))
            case control.ResetDone(epoch=epoch, num_host_blocks=num_host_blocks):
                name = self._control.names[identity]
                self._act(self._assembly.reset_done(name, epoch, num_host_blocks))
            case control.Stored(requests=keys, indices=indices) if self._is_current(message.epoch):
                self._tell(BlocksStored(keys, indices))
            case control.Released(requests=keys) if self._is_current(message.epoch):
                self._tell(KvReleased(keys))
            case control.KvReport():
                self._on_kv_report(message)
            case spans.StageSpans() | spans.CopySpans():
                self._spans.report(message)
            case control.Failure(error=error):
                log.error("%s failed: %s", self._control.names[identity], error)
            case _:
                pass  # of an epoch that ended

    def _on_hello(self, identity: bytes, message: control.Hello) -> None:
        if identity not in self._control.names and identity != LAUNCHER:
            log.error("Hello of a process that is not configured: %r", identity)
            return
        if message.protocol != PROTOCOL_VERSION:
            # Without this process there is no system, and starting it again would not help.
            raise ConfigError(
                f"{message.role} {message.index} speaks protocol {message.protocol}, this "
                f"coordinator {PROTOCOL_VERSION}; start all processes from one installation"
            )
        if identity not in self._control.names:
            self._launcher = True
            self._control.to(identity, control.Welcome(instance_id=self._instance_id))
            if self._assembly.running:
                ready = control.SystemReady(epoch=self._assembly.epoch)
                self._control.to(identity, ready)
            return
        self._control.to(identity, control.Welcome(instance_id=self._instance_id))
        self._act(self._assembly.hello(self._control.names[identity], message))

    def _on_step_done(self, message: control.StepDone) -> None:
        wait_kv_s = self._view.stage_step(message.stage, message.state_seconds)
        if not self._is_current(message.epoch):
            return
        self._tell(StageComputed(message.stage, message.step, message.compute_s, wait_kv_s))
        error = self._scheduler.state.costs.take_error(message.stage)
        if error is not None:
            self.metrics.step_predicted(message.stage, error)
        if message.tokens is None:
            return
        self._step_returned(message.step, self._parts.stage_done(message))

    def _step_returned(self, step: int, whole: WholeStep | None) -> None:
        """`whole`: None while a part of the step is missing."""
        if whole is None:
            return
        self._tell(hand_out(step, whole, self._scheduler.rows_of(step), self._sessions))

    def _on_kv_report(self, report: control.KvReport) -> None:
        grown_bytes, grown_seconds = self._view.kv_report(report)
        if self._assembly.running:  # else nobody knows yet how many links there are
            self._tell(LinkMeasured(grown_bytes, grown_seconds))

    def _is_current(self, epoch: int) -> bool:
        return self._assembly.running and epoch == self._assembly.epoch

    def _act(self, actions: Iterable[Action]) -> None:
        for action in actions:
            match action:
                case ResetAll(message):
                    log.info("reset to epoch %d", message.epoch)
                    self._parts.reset()
                    self._control.to_all(message)
                case Paused():
                    log.warning("paused: waiting for %s", ", ".join(self._assembly.missing))
                    self._tell(action)
                case Resumed():
                    check_capacity(self._config, action)
                    log.info("ready, epoch %d", action.epoch)
                    self._tell(action)
                    if self._launcher:
                        ready = control.SystemReady(epoch=action.epoch)
                        self._control.to_launcher(ready)

    # Jobs

    def _serve_jobs(self) -> None:
        """What is known of jobs goes to the journal; then answers leave, and requests start."""
        waiting = self._scheduler.state.waiting
        answers, unwanted = self._jobs.write(waiting, may_start=self._assembly.running)
        for client, answer in answers:
            self._clients.answer(client, answer)
        for key in unwanted:
            self._cancel(key)
        until = time.thread_time() + JOB_SLICE_S
        while time.thread_time() < until and (event := self._jobs.start()) is not None:
            self._tell(event)

    def _drain(self) -> None:
        """No new requests. Of jobs those are finished that run."""
        log.info("draining: no new requests are accepted")
        self._clients.draining = self._view.draining = True
        for key in self._jobs.drain(set(self._scheduler.state.waiting.never_ran())):
            self._cancel(key)

    def _server_hello(self) -> ingest.ServerHello:
        settings = _settings_of(self._config).encode()
        return ingest.ServerHello(
            protocol=PROTOCOL_VERSION,
            instance_id=self._instance_id,
            model_name=self._config.served_model_name,
            max_model_len=self._config.max_model_len,
            credits=self._config.client_credits,
            settings=hashlib.blake2b(settings, digest_size=16).hexdigest(),
        )

    # Carrying out

    def _tell(self, event: Event) -> None:
        """Feed the scheduling core and carry out its commands. Results go last: a stage waits for
        its plan, and turning tokens into text takes time."""
        results: list[FinishRequest] = []
        for command in self._scheduler.handle(event, time.monotonic()):
            if isinstance(command, FinishRequest):
                results.append(command)
            else:
                self._carry_out(command)
        for result in results:
            ended = self._sessions.finish(result, time.monotonic())
            if ended is not None:
                key, finished = ended
                self.metrics.request_finished(finished)
                self._jobs.finished(key, finished)

    def _cancel(self, key: int) -> None:
        self._tell(Cancelled(key, self._sessions.num_choices(key)))

    def _carry_out(self, command: ToStages | ToDaemon) -> None:
        match command:
            case ToStages(message):
                self._control.to_stages(message)
            case ToDaemon(message):
                self._control.to_daemon(message)

    def _finish_round(self) -> None:
        for key in self._sessions.deliver():
            self._cancel(key)
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + LOOK_INTERVAL_S
        self._look_around(now)
        if now >= self._next_snapshot:
            totals = self.metrics.collector.jobs = self._jobs.totals()
            self._view.jobs = self._job_eta.progress(totals.unfinished, now)
            self._view.refresh()
            self._next_snapshot = now + SNAPSHOT_INTERVAL_S

    def _look_around(self, now: float) -> None:
        """What is due by the clock, and need not be looked for in every round."""
        for key in self._sessions.over_time(now):
            self._cancel(key)
        self.metrics.collector.undelivered = self._sessions.undelivered
        idle = self._sessions.is_idle and self._jobs.is_idle
        if self._clients.draining and not self._drained and idle:
            self._drained = True
            self._control.to_launcher(control.Drained())
        for process, silent_s in self._liveness.silent(now):
            log.error("%s has said nothing for %.0f s", process, silent_s)
            hung = control.Unresponsive(process=process, silent_s=silent_s)
            self._control.to_launcher(hung)
        self._spans.tick(now)
        self._garbage.tick(now, is_busy=bool(self._scheduler.state.in_flight))


def _settings_of(config: EngineConfig) -> str:
    """That results depend on: jobs that were submitted under others are held."""
    names = ("model", "served_model_name", "dtype", "seed")
    return " ".join(f"{name}={getattr(config, name)!r}" for name in names)
