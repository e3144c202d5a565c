"""The work loop of a stage on a GPU. It never waits for the GPU.

A step is launched as soon as what it needs is announced, which is when it is queued elsewhere: the
GPU's streams wait for it, not this process. Its own results are announced in the same way, so that
several stages queue steps well ahead of their kernels. Only tokens, and the news that a step is
over, wait until it is: a thread waits for that and wakes the loop.
"""

import contextlib
import os
from collections import deque
from typing import Final

from pipemax.proto.cuda.event_watcher import EventWatcher
from pipemax.proto.cuda.runtime import CudaEvent, CudaRuntime
from pipemax.proto.errors import InvariantError
from pipemax.proto.messages.control import StepPlan
from pipemax.stage_worker.devices.cuda.rings import CudaRings
from pipemax.stage_worker.devices.cuda.step import CudaSteps, Flight, Prepared
from pipemax.stage_worker.executor import Links
from pipemax.stage_worker.state_clock import StateClock
from pipemax.stage_worker.step_queue import StepQueue

MAX_IN_FLIGHT: Final = 4
"""Steps queued on the GPU at once. Two are enough for it never to wait for this process; more cover
a process that is late itself, and cost a version of all buffers each."""
INPUT_VERSIONS: Final = MAX_IN_FLIGHT + 1
"""One more is prepared meanwhile."""


class CudaWorkLoop:
    """Runs the steps of `queue` until told to stop."""

    def __init__(
        self,
        runtime: CudaRuntime,
        queue: StepQueue,
        steps: CudaSteps,
        links: Links,
        clock: StateClock,
        rings: CudaRings,
    ) -> None:
        self._queue = queue
        self._steps = steps
        self._links = links
        self._clock = clock
        self._rings = rings
        self._prepared: dict[tuple[int, int], Prepared] = {}
        """By (epoch, step): the first plan, and the one behind it."""
        self._flights: deque[Flight] = deque()
        self._before: CudaEvent | None = None
        """End of the step that landed last, while others are in flight."""
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._watcher: EventWatcher[Flight] = EventWatcher(runtime, "steps", self._wake_fd)
        links.listen(self._wake_fd, self._on_ended)

    def run(self) -> None:
        """Returns when told to stop, with steps in flight maybe; whatever a step raises ends the
        loop."""
        try:
            while not self._links.stopping:
                self._links.pump(wait=not self._advance())
        finally:
            self._watcher.close()
            os.close(self._wake_fd)

    def _advance(self) -> bool:
        """Does one thing, if there is one to do without waiting."""
        self._forget_void_inputs()
        plan = self._queue.next_plan
        if plan is None:
            self._clock.switch("wait_plan")
            return False
        missing = self._queue.missing(plan)
        self._clock.switch(missing or "prepare")
        prepared = self._prepare(plan)
        if prepared is None:
            return not self._flights  # a step that lands wakes the loop; see `InputVersions.take`
        full = len(self._flights) == MAX_IN_FLIGHT or not self._steps.ready(prepared)
        if missing is not None or full:
            return self._prepare_one_ahead()
        self._launch(self._prepared.pop((plan.epoch, plan.step)))
        return True

    def _forget_void_inputs(self) -> None:
        for epoch, step in list(self._prepared):
            if epoch != self._queue.epoch:
                self._steps.forget(self._prepared.pop((epoch, step)))

    def _prepare(self, plan: StepPlan) -> Prepared | None:
        """None while all versions of the inputs are taken."""
        key = (plan.epoch, plan.step)
        if key not in self._prepared:
            prepared = self._steps.prepare(plan)
            if prepared is None:
                return None
            self._prepared[key] = prepared
        return self._prepared[key]

    def _prepare_one_ahead(self) -> bool:
        """Whether there was something to do."""
        for plan in self._queue.plans[1:2]:
            if (plan.epoch, plan.step) not in self._prepared:
                return self._prepare(plan) is not None
        return False

    def _launch(self, prepared: Prepared) -> None:
        """The others learn of it at once: of rows first, the next stage waits for them."""
        plan = prepared.plan
        self._clock.take_off()
        flight = self._steps.launch(prepared, self._queue.rows(plan), self._queue.last_load(plan))
        self._flights.append(flight)
        self._watcher.watch(flight.version.ended, flight)
        if flight.rows is not None and self._steps.announces_rows_ahead:
            self._links.send_rows(plan, flight.rows)
        self._links.computed(plan, flight.computed)
        self._queue.finish(plan)

    def _on_ended(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake_fd)
        for flight in self._watcher.passed():
            if flight is not self._flights.popleft():
                raise InvariantError(f"step {flight.plan.step} ended out of turn")
            self._land(flight)

    def _land(self, flight: Flight) -> None:
        """A step that a reset voided lands silently."""
        plan, landed = flight.plan, not self._flights
        self._clock.step = plan.step
        spent = self._steps.spent(flight, self._before)
        self._before = None if landed else flight.version.marks.computed
        self._clock.settle(spent.states, landed=landed)
        wanted = plan.epoch == self._queue.epoch
        self._clock.switch("compute")  # where the host still draws tokens
        sampled = self._steps.land(flight, wanted=wanted)
        self._clock.switch("send")
        if wanted:
            if flight.rows is not None and not self._steps.announces_rows_ahead:
                self._links.send_rows(plan, flight.rows)
            if sampled is None:
                self._links.step_done(plan, spent.compute_s, None)
            else:
                self._links.step_done(
                    plan, spent.compute_s, sampled.tokens, sampled.logprobs, sampled.shares
                )
        if landed:
            self._rings.collect()
