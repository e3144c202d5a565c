"""What a stage was told to do and what it already has for it. Pure: no sockets, no clock."""

from collections import deque
from typing import Literal

from pipemax.proto.errors import InvariantError
from pipemax.proto.messages.control import StepPlan
from pipemax.stage_worker.channels.ring import Rows

Missing = Literal["wait_activation", "wait_kv"]


class StepQueue:
    """Plans in step order, with the activations and loads that have arrived for them.

    Activations and loads may come before their plan. Whatever belongs to another epoch is void
    and ignored.
    """

    def __init__(self, *, takes_activations: bool) -> None:
        """`takes_activations`: false on stage 0, whose input is token ids."""
        self._takes_activations = takes_activations
        self.epoch = -1
        """-1 before the first reset."""
        self._plans: deque[StepPlan] = deque()
        self._last_step = -1
        self._rows: dict[int, Rows] = {}
        self._loaded: dict[int, int] = {}

    def reset(self, epoch: int) -> None:
        """Forgets everything; from now on only messages of `epoch` count."""
        self.epoch = epoch
        self._plans.clear()
        self._last_step = -1
        self._rows.clear()
        self._loaded.clear()

    def add_plan(self, plan: StepPlan) -> None:
        """Raises InvariantError when plans do not come in step order."""
        if plan.epoch != self.epoch:
            return
        if plan.step <= self._last_step:
            raise InvariantError(f"step {plan.step} was planned after step {self._last_step}")
        self._last_step = plan.step
        self._plans.append(plan)

    def add_rows(self, epoch: int, step: int, rows: Rows) -> None:
        """`rows` `[rows, hidden]` are the previous stage's output of `step`."""
        if epoch == self.epoch:
            self._rows[step] = rows

    def add_loaded(self, epoch: int, step: int, copy: int = -1) -> None:
        """`copy`: see Loaded."""
        if epoch == self.epoch:
            self._loaded[step] = copy

    @property
    def next_plan(self) -> StepPlan | None:
        return self._plans[0] if self._plans else None

    @property
    def plans(self) -> tuple[StepPlan, ...]:
        return tuple(self._plans)

    def missing(self, plan: StepPlan) -> Missing | None:
        """What keeps `plan` from being computed; None when nothing does."""
        if self._takes_activations and plan.step not in self._rows:
            return "wait_activation"
        if plan.wait_for_load and plan.step not in self._loaded:
            return "wait_kv"
        return None

    def last_load(self, plan: StepPlan) -> int:
        """Number of the copy behind which a plan that misses nothing may be computed; -1: at once.
        See Loaded."""
        return self._loaded[plan.step] if plan.wait_for_load else -1

    def rows(self, plan: StepPlan) -> Rows | None:
        """The activations of a plan that misses nothing, `[rows, hidden]`; None on stage 0.
        Raises InvariantError when they are not one row per token of the plan."""
        if not self._takes_activations:
            return None
        rows = self._rows[plan.step]
        planned = len(plan.token_ids) // 4
        if len(rows) != planned:
            raise InvariantError(
                f"step {plan.step}: {len(rows)} rows came from the previous stage, "
                f"{planned} tokens are planned"
            )
        return rows

    def finish(self, plan: StepPlan) -> None:
        """Forgets the first plan, which was computed."""
        self._plans.popleft()
        self._rows.pop(plan.step, None)
        self._loaded.pop(plan.step, None)
