"""A modelled stage: does with plans, activations and loads what a stage worker's executor does, and
takes its time from the performance model."""

from collections import deque
from typing import Protocol

from pipemax.proto.messages.control import StepPlan
from pipemax.services.simulator.cores import SharedCores
from pipemax.services.simulator.engine import EventLoop, to_ns
from pipemax.services.simulator.measured import MeasuredStage
from pipemax.services.simulator.records import StateRecord
from pipemax.stage_worker.modelled.loads import load_of
from pipemax.stage_worker.modelled.roofline import StageModel


class PlannedStep:
    """A plan on its way, with what its time depends on; shared by all stages."""

    __slots__ = ("epoch", "load", "plan", "step", "times_ns", "wait_for_load")

    def __init__(self, plan: StepPlan) -> None:
        self.plan = plan
        self.epoch = plan.epoch
        self.step = plan.step
        self.wait_for_load = plan.wait_for_load
        self.load = load_of(plan)
        self.times_ns: dict[int, int] = {}
        """Compute time by model; equal stages share one."""

    def compute_ns(self, model: StageModel | MeasuredStage) -> int:
        found = self.times_ns.get(id(model))
        if found is None:
            found = self.times_ns[id(model)] = to_ns(model.step_s(self.load))
        return found


class Surroundings(Protocol):
    """Whom a stage talks to."""

    def computed(self, stage: "ModelledStage", planned: PlannedStep, compute_ns: int) -> None:
        """The stage has computed a step: tell the next stage, the daemon and the coordinator."""

    def vary(self, compute_ns: int) -> int:
        """A duration with this run's jitter."""


class ModelledStage:
    """One stage of one run; survives crashes as a new incarnation."""

    def __init__(
        self,
        index: int,
        model: StageModel | MeasuredStage,
        loop: EventLoop,
        record: StateRecord,
        around: Surroundings,
        cores: SharedCores | None = None,
    ) -> None:
        """`cores`: that it shares with other stages; None has its own."""
        self.index = index
        self.model = model
        self.record = record
        self.alive = True
        self.incarnation = 0
        self.epoch = -1
        self.awake_ns = -1
        """Until then it does nothing: stopped, or swapped out."""
        self.speed = 1.0
        """Share of the nominal speed; faults lower it."""
        self._loop = loop
        self._around = around
        self._run = loop.after if cores is None else cores.after
        self._overhead_ns = to_ns(model.overhead_s) if isinstance(model, MeasuredStage) else 0
        self._began_ns = 0
        self._plans: deque[PlannedStep] = deque()
        self._rows: set[int] = set()
        self._loaded: set[int] = set()
        self._computing = False
        self._told_wait_kv_ns = 0

    def take_wait_kv_ns(self) -> int:
        """How long it has waited for KV since the last call."""
        total = self.record.spent_ns["wait_kv"]
        waited, self._told_wait_kv_ns = total - self._told_wait_kv_ns, total
        return waited

    def crash(self) -> None:
        """Everything it held is gone."""
        self.alive = False
        self.awake_ns = -1
        self._computing = False
        self.incarnation += 1
        self._forget(-1)
        self.record.switch("down", self._loop.now_ns)

    def restart(self) -> None:
        self.alive = True
        self._advance()

    def reset(self, epoch: int) -> None:
        """Enters `epoch` and forgets plans and activations. A step being computed runs to its end;
        what it sends is of the old epoch and ignored."""
        self._forget(epoch)
        if not self._computing:
            self._advance()

    def add_plan(self, planned: PlannedStep) -> None:
        if planned.epoch == self.epoch:
            self._plans.append(planned)
            if not self._computing and len(self._plans) == 1:
                self._advance()

    def add_rows(self, epoch: int, step: int) -> None:
        """Activations of `step` have arrived."""
        if epoch == self.epoch:
            self._rows.add(step)
            if not self._computing:
                self._advance()

    def add_loaded(self, epoch: int, step: int) -> None:
        if epoch == self.epoch:
            self._loaded.add(step)
            if not self._computing:
                self._advance()

    def _forget(self, epoch: int) -> None:
        self.epoch = epoch
        self._plans.clear()
        self._rows.clear()
        self._loaded.clear()

    def _advance(self) -> None:
        """Starts the next step if nothing it needs is missing, else says what is."""
        now_ns = self._loop.now_ns
        if not self._plans:
            self.record.switch("wait_plan", now_ns)
            return
        planned = self._plans[0]
        if self.index and planned.step not in self._rows:
            self.record.switch("wait_activation", now_ns)
            return
        if planned.wait_for_load and planned.step not in self._loaded:
            self.record.switch("wait_kv", now_ns)
            return
        self.record.switch("compute", now_ns)
        self._computing = True
        compute_ns = self._around.vary(planned.compute_ns(self.model))
        if self.speed != 1.0:
            compute_ns = round(compute_ns / self.speed)
        self._began_ns = now_ns
        self._run(compute_ns, self._computed, planned, self.incarnation)

    def _computed(self, planned: PlannedStep, incarnation: int) -> None:
        if self._loop.now_ns < self.awake_ns:
            self._loop.at(self.awake_ns, self._computed, planned, incarnation)
            return
        compute_ns = self._loop.now_ns - self._began_ns
        if self._overhead_ns and incarnation == self.incarnation:
            self.record.switch("send", self._loop.now_ns)
            self._loop.after(self._overhead_ns, self._end, planned, compute_ns, incarnation)
        else:
            self._end(planned, compute_ns, incarnation)

    def _end(self, planned: PlannedStep, compute_ns: int, incarnation: int) -> None:
        if incarnation != self.incarnation:
            return
        self._computing = False
        if planned.epoch == self.epoch:
            self._plans.popleft()
            self._rows.discard(planned.step)
            self._loaded.discard(planned.step)
        self._around.computed(self, planned, compute_ns)
        self._advance()
