"""The stage's sockets: messages in, messages out, and the agreements a reset asks for."""

import logging
import time
from collections.abc import Callable

import zmq

from pipemax.proto.messages.control import (
    Beat,
    Hello,
    Reset,
    ResetDone,
    RowLogprobs,
    StageReady,
    StepDone,
    StepPlan,
    Stop,
    Welcome,
)
from pipemax.proto.messages.kv import AttachPool, Computed, CopyOrder, Loaded, PoolAttached
from pipemax.proto.messages.spans import RecordSpans
from pipemax.proto.messages.types import pack_i32
from pipemax.stage_worker.channels.connect import Neighbours
from pipemax.stage_worker.channels.logits import Shares
from pipemax.stage_worker.channels.ring import Rows
from pipemax.stage_worker.kv_end import KvEnd
from pipemax.stage_worker.peer import Peer
from pipemax.stage_worker.span_report import SpanReport
from pipemax.stage_worker.state_clock import StateClock
from pipemax.stage_worker.step_queue import StepQueue
from pipemax.stage_worker.waiting import SpinThenBlock

TICK_S = 0.5
"""Between beats; also the longest wait before what was not answered is said again, or before a
stop signal is noticed."""

log = logging.getLogger(__name__)


class StageShell:
    """Connects the executor (see `executor.Links`) to coordinator, daemon and neighbours.

    Agreements are repeated until they are answered: whichever process was away at the first
    attempt gets the next one.
    """

    def __init__(
        self,
        control: Peer,
        reports: Peer,
        kv: Peer,
        *,
        hello: Hello,
        ready: StageReady,
        pool: KvEnd,
        neighbours: Neighbours,
        queue: StepQueue,
        clock: StateClock,
        spin_wait_s: float = 0.0,
    ) -> None:
        """reports: to the coordinator too, for steps and beats. spin_wait_s: see EngineConfig."""
        self._control = control
        self._reports = reports
        self._kv = kv
        self._hello = hello
        self._ready = ready
        self._pool = pool
        self._neighbours = neighbours
        self._queue = queue
        self._clock = clock
        self._spans = SpanReport(ready.stage, clock)
        self._instance_id: str | None = None
        self._reset_done = True
        self._stopping = False
        self._next_tick_s = time.monotonic() + TICK_S
        self._poller = zmq.Poller()
        self._wait = SpinThenBlock(self._poller, spin_wait_s)
        self._handlers: dict[object, Callable[[], None]] = {}
        self._listen()

    def _listen(self) -> None:
        """Control first: what it says may void the rest."""
        sources: list[tuple[zmq.Socket[bytes], Callable[[], None]]] = [
            (self._control.socket, self._on_control),
            (self._kv.socket, self._on_kv),
        ]
        if self._neighbours.previous is not None:
            sources.append((self._neighbours.previous.socket, self._on_activations))
        if self._neighbours.next is not None:
            sources.append((self._neighbours.next.socket, self._neighbours.next.poll))
        if self._neighbours.samplers is not None:
            samplers = self._neighbours.samplers
            sources += [(socket, samplers.poll) for socket in samplers.sockets]
        for source, handler in sources:
            self._poller.register(source, zmq.POLLIN)
            self._handlers[source] = handler
        pool_fd = self._pool.fileno()
        if pool_fd is not None:
            self.listen(pool_fd, self._tell_ended_copies)

    # -- what the executor sees (see `executor.Links`)

    @property
    def stopping(self) -> bool:
        return self._stopping

    def pump(self, *, wait: bool) -> None:
        timeout_s = max(0.0, self._next_tick_s - time.monotonic()) if wait else 0.0
        for source, _ in self._wait.poll(timeout_s):
            self._handlers[source]()
        self._finish_reset()
        if time.monotonic() >= self._next_tick_s:
            self._next_tick_s = time.monotonic() + TICK_S
            self._tick()

    def send_rows(self, plan: StepPlan, rows: Rows) -> None:
        assert self._neighbours.next is not None
        self._neighbours.next.send(plan.epoch, plan.step, plan.slot, rows)

    def listen(self, fd: int, handler: Callable[[], None]) -> None:
        self._poller.register(fd, zmq.POLLIN)
        self._handlers[fd] = handler

    def step_done(
        self,
        plan: StepPlan,
        compute_s: float,
        tokens: list[int] | None,
        logprobs: tuple[RowLogprobs, ...] = (),
        shares: Shares = (),
    ) -> None:
        """Logits first: samplers have work to do."""
        if self._neighbours.samplers is not None:
            self._neighbours.samplers.send(plan, shares)
        done = StepDone(
            epoch=plan.epoch,
            step=plan.step,
            stage=self._ready.stage,
            compute_s=compute_s,
            state_seconds=self._clock.seconds(),
            tokens=None if tokens is None else pack_i32(tokens),
            logprobs=logprobs,
            elsewhere=pack_i32(row for share in shares for row in share),
        )
        self._reports.send(done)

    def computed(self, plan: StepPlan, event: int = -1) -> None:
        self._kv.send(Computed(epoch=plan.epoch, step=plan.step, event=event))

    # -- from outside the work loop

    def stop(self) -> None:
        """Ends the work loop within a tick. May be called from a signal handler."""
        self._stopping = True

    # -- messages

    def _on_control(self) -> None:
        while (message := self._control.receive()) is not None:
            if isinstance(message, StepPlan):
                self._queue.add_plan(message)
            elif isinstance(message, Reset):
                self._on_reset(message)
            elif isinstance(message, RecordSpans):
                self._spans.record(message.seconds)
            elif isinstance(message, Welcome):
                self._on_welcome(message)
            elif isinstance(message, Stop):
                self._stopping = True

    def _on_kv(self) -> None:
        while (message := self._kv.receive()) is not None:
            if isinstance(message, Loaded):
                self._queue.add_loaded(message.epoch, message.step, message.copy)
            elif isinstance(message, CopyOrder):
                self._pool.order(message)
            elif isinstance(message, PoolAttached) and message.epoch == self._queue.epoch:
                self._pool.attach(message)

    def _tell_ended_copies(self) -> None:
        for ended in self._pool.ended():
            self._kv.send(ended)

    def _on_activations(self) -> None:
        assert self._neighbours.previous is not None
        for arrival in self._neighbours.previous.poll():
            self._queue.add_rows(arrival.epoch, arrival.step, arrival.rows)

    def _on_welcome(self, welcome: Welcome) -> None:
        """Another coordinator than before knows nothing of us, and counts its epochs anew."""
        if welcome.instance_id == self._instance_id:
            return
        if self._instance_id is not None:
            log.info("a new coordinator, instance %s", welcome.instance_id)
            self._reset_to(-1)
            self._reset_done = True
        self._instance_id = welcome.instance_id
        self._control.send(self._ready)

    def _on_reset(self, reset: Reset) -> None:
        if reset.epoch <= self._queue.epoch:
            return
        log.info("reset to epoch %d", reset.epoch)
        self._reset_to(reset.epoch)
        self._reset_done = False
        self._attach_pool()
        self._neighbours.offer()

    def _reset_to(self, epoch: int) -> None:
        self._queue.reset(epoch)
        self._pool.detach()
        self._neighbours.reset(epoch)

    def _attach_pool(self) -> None:
        offer = self._pool.offer()
        self._kv.send(
            AttachPool(
                epoch=self._queue.epoch,
                stage=self._ready.stage,
                incarnation=self._hello.incarnation,
                handle=offer.handle,
                cuda=offer.cuda,
                num_blocks=self._ready.num_blocks,
                block_bytes=self._ready.block_bytes,
            )
        )

    def _finish_reset(self) -> None:
        if not self._reset_done and self._pool.attached and self._neighbours.agreed:
            self._reset_done = True
            self._control.send(ResetDone(epoch=self._queue.epoch))

    def _tick(self) -> None:
        self._reports.send(self._hello)  # a restarted coordinator learns of us by it
        if self._instance_id is None:
            return
        self._reports.send(Beat(state_seconds=self._clock.seconds()))
        if (spans := self._spans.take()) is not None:
            self._reports.send(spans)
        if self._reset_done:
            return
        if not self._pool.attached:
            self._attach_pool()
        self._neighbours.offer()
