"""The work loop of a stage: steps in order, each from its plan to its results.

Between and inside the waits of a step messages are still handled (`Links.pump`), so a reset or a
stop gets through at any time but during the computation itself.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from pipemax.proto.messages.control import RowLogprobs, StepPlan
from pipemax.proto.states import State
from pipemax.stage_worker.channels.logits import Shares
from pipemax.stage_worker.channels.ring import Rows
from pipemax.stage_worker.state_clock import StateClock
from pipemax.stage_worker.step_queue import StepQueue

Batch = TypeVar("Batch")


@dataclass(frozen=True, slots=True)
class StepResult:
    """Output of one step on this stage: exactly one of the two is given."""

    rows: Rows | None = None
    """`[T, hidden]` for the next stage."""
    tokens: list[int] | None = None
    """From the last stage, one per sample row of the plan."""
    logprobs: tuple[RowLogprobs, ...] = ()
    shares: Shares = ()
    """Rows that samplers sample; their logits lie in the ring, and in `tokens` is NO_TOKEN."""
    compute_s: float | None = None
    """How long the device says the step took; None: as long as this process waited for it."""


class StepWork(Protocol[Batch]):
    """What a step does, apart from when."""

    def prepare(self, plan: StepPlan) -> Batch:
        """Inputs that depend on the plan alone. Raises WireError when it contradicts itself."""

    def await_rows(self, rows: Rows) -> None:
        """Returns once `rows`, which a message announced, can be computed with."""

    def compute(self, plan: StepPlan, batch: Batch, rows: Rows | None) -> StepResult:
        """`rows` `[T, hidden]` from the previous stage; None on stage 0."""


class Links(Protocol):
    """The stage's connections to the other processes."""

    @property
    def stopping(self) -> bool:
        """Somebody asked this process to leave."""

    def pump(self, *, wait: bool) -> None:
        """Handles every message that has arrived; with `wait`, first waits until there is one,
        though never for more than a second."""

    def send_rows(self, plan: StepPlan, rows: Rows) -> None:
        """To the next stage."""

    def step_done(
        self,
        plan: StepPlan,
        compute_s: float,
        tokens: list[int] | None,
        logprobs: tuple[RowLogprobs, ...] = (),
        shares: Shares = (),
    ) -> None:
        """To the coordinator: the step is over. To samplers, if any: their shares of it."""

    def computed(self, plan: StepPlan, event: int = -1) -> None:
        """To the daemon: see the message of this name."""

    def listen(self, fd: int, handler: Callable[[], None]) -> None:
        """From now on `pump` calls `handler` whenever `fd` is readable."""


class _StepAbortedError(Exception):
    """A reset voided the step, or the process is to stop."""


class Executor(Generic[Batch]):
    """Runs the steps of `queue` until told to stop."""

    def __init__(
        self, queue: StepQueue, work: StepWork[Batch], links: Links, clock: StateClock
    ) -> None:
        self._queue = queue
        self._work = work
        self._links = links
        self._clock = clock
        self._prepared: dict[tuple[int, int], Batch] = {}
        """By (epoch, step)."""

    def run(self) -> None:
        """Returns when told to stop; whatever a step raises ends the loop."""
        while not self._links.stopping:
            with contextlib.suppress(_StepAbortedError):
                self._links.pump(wait=False)
                self._forget_void_inputs()
                plan = self._next_plan()
                batch = self._inputs(plan)
                self._wait_while_missing(plan, "wait_activation")
                self._wait_while_missing(plan, "wait_kv")
                rows = self._arrived_rows(plan)
                result, compute_s = self._compute(plan, batch, rows)
                self._send(plan, result, compute_s)

    def _next_plan(self) -> StepPlan:
        self._wait("wait_plan", lambda: self._queue.next_plan is None, self._queue.epoch)
        plan = self._queue.next_plan
        assert plan is not None
        return plan

    def _inputs(self, plan: StepPlan) -> Batch:
        """Time spent here is `prepare` only if it delays the step: while activations or KV are
        missing anyway, it is theirs."""
        self._clock.switch(self._queue.missing(plan) or "prepare")
        self._clock.step = plan.step
        self._prepare(plan)
        return self._prepared.pop((plan.epoch, plan.step))

    def _wait_while_missing(self, plan: StepPlan, what: State) -> None:
        self._wait(what, lambda: self._queue.missing(plan) == what, plan.epoch)

    def _arrived_rows(self, plan: StepPlan) -> Rows | None:
        rows = self._queue.rows(plan)
        if rows is not None:
            self._clock.switch("wait_activation")
            self._work.await_rows(rows)
        return rows

    def _compute(self, plan: StepPlan, batch: Batch, rows: Rows | None) -> tuple[StepResult, float]:
        self._clock.switch("compute")
        result = self._work.compute(plan, batch, rows)
        waited_s = self._clock.switch("send")
        return result, waited_s if result.compute_s is None else result.compute_s

    def _send(self, plan: StepPlan, result: StepResult, compute_s: float) -> None:
        """Activations first: the next stage waits for them. Then the tokens: the next plan does."""
        if result.rows is not None:
            self._links.send_rows(plan, result.rows)
        self._links.step_done(plan, compute_s, result.tokens, result.logprobs, result.shares)
        self._links.computed(plan)
        self._queue.finish(plan)

    def _wait(self, state: State, waiting: Callable[[], bool], epoch: int) -> None:
        """Handles messages until `waiting` is false. What can be prepared for later steps is
        prepared meanwhile. Raises _StepAbortedError when `epoch` ends or the process is to stop."""
        if not waiting():
            return
        self._clock.switch(state)
        while waiting():
            self._links.pump(wait=not self._prepare_one_ahead())
            if self._links.stopping or self._queue.epoch != epoch:
                raise _StepAbortedError

    def _forget_void_inputs(self) -> None:
        for epoch, step in list(self._prepared):
            if epoch != self._queue.epoch:
                del self._prepared[epoch, step]

    def _prepare_one_ahead(self) -> bool:
        return any(self._prepare(plan) for plan in self._queue.plans[1:])

    def _prepare(self, plan: StepPlan) -> bool:
        """Whether there was something to do."""
        key = (plan.epoch, plan.step)
        if key in self._prepared:
            return False
        self._prepared[key] = self._work.prepare(plan)
        return True
