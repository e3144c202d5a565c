"""The work loop with a fake model, fake peers and a clock that only the fakes move."""

from collections.abc import Callable

import pytest
import torch

from pipemax.proto.errors import InvariantError
from pipemax.proto.messages.control import StepPlan
from pipemax.stage_worker.executor import Executor, StepResult
from pipemax.stage_worker.state_clock import StateClock
from pipemax.stage_worker.step_queue import StepQueue
from support.step_plans import decode_plan

PREPARE_S, COMPUTE_S, WAIT_S = 1, 100, 10_000


class World:
    """One stage whose peers follow a script: each wait of the stage plays the next entry."""

    def __init__(self, *, takes_activations: bool = True, is_last: bool = False) -> None:
        self.now_s = 0
        self.queue = StepQueue(takes_activations=takes_activations)
        self.queue.reset(1)
        self.clock = StateClock(lambda: self.now_s * 10**9)
        self.is_last = is_last
        self.rows_late_s = 0
        self.device_s: float | None = None
        self.script: list[Callable[[], None]] = []
        self.log: list[str] = []
        self.reported: list[tuple[int, float, list[int] | None]] = []
        self.computed_steps: list[tuple[int, int]] = []
        self.stopping = False

    def run(self, *script: Callable[[], None]) -> dict[str, float]:
        """Runs until the script is played; seconds by state."""
        self.script = list(script)
        self.executor = Executor(self.queue, self, self, self.clock)
        self.executor.run()
        return self.clock.seconds()

    # -- executor.Links

    def pump(self, *, wait: bool) -> None:
        if not wait:
            return
        self.now_s += WAIT_S
        if self.script:
            self.script.pop(0)()
        else:
            self.stopping = True

    def send_rows(self, plan: StepPlan, rows: torch.Tensor) -> None:
        self.log.append(f"send {plan.step}")

    def step_done(
        self, plan: StepPlan, compute_s: float, tokens: list[int] | None, *rest: object
    ) -> None:
        self.log.append(f"report {plan.step}")
        self.reported.append((plan.step, compute_s, tokens))

    def computed(self, plan: StepPlan, event: int = -1) -> None:
        self.computed_steps.append((plan.step, event))

    # -- executor.StepWork

    def prepare(self, plan: StepPlan) -> int:
        self.now_s += PREPARE_S
        self.log.append(f"prepare {plan.step}")
        return plan.step

    def await_rows(self, rows: torch.Tensor) -> None:
        self.now_s += self.rows_late_s

    def compute(self, plan: StepPlan, batch: int, rows: torch.Tensor | None) -> StepResult:
        assert batch == plan.step
        self.now_s += COMPUTE_S
        self.log.append(f"compute {plan.step}")
        if self.is_last:
            return StepResult(tokens=[7], compute_s=self.device_s)
        return StepResult(rows=torch.zeros(1, 2) if rows is None else rows)

    # -- what its peers do

    def plan(self, *plans: StepPlan) -> Callable[[], None]:
        def play() -> None:
            for plan in plans:
                self.queue.add_plan(plan)

        return play

    def rows(self, step: int, count: int = 1, epoch: int = 1) -> Callable[[], None]:
        return lambda: self.queue.add_rows(epoch, step, torch.zeros(count, 2))

    def loaded(self, step: int, epoch: int = 1) -> Callable[[], None]:
        return lambda: self.queue.add_loaded(epoch, step)

    def reset(self, epoch: int) -> Callable[[], None]:
        return lambda: self.queue.reset(epoch)


def test_first_stage_prepares_computes_sends_reports() -> None:
    world = World(takes_activations=False)
    seconds = world.run(world.plan(decode_plan(0)))
    assert world.log == ["prepare 0", "compute 0", "send 0", "report 0"]
    assert world.reported == [(0, COMPUTE_S, None)]
    assert world.computed_steps == [(0, -1)], "the step is over when the daemon hears of it"
    assert seconds["wait_plan"] == 2 * WAIT_S
    assert seconds["prepare"] == PREPARE_S
    assert seconds["compute"] == COMPUTE_S
    assert seconds["wait_activation"] == seconds["wait_kv"] == 0


def test_last_stage_reports_tokens_and_sends_nothing() -> None:
    world = World(takes_activations=False, is_last=True)
    world.run(world.plan(decode_plan(0)))
    assert world.log == ["prepare 0", "compute 0", "report 0"]
    assert world.reported == [(0, COMPUTE_S, [7])]


def test_the_device_may_know_better_how_long_a_step_took() -> None:
    world = World(takes_activations=False, is_last=True)
    world.device_s = 55.0
    seconds = world.run(world.plan(decode_plan(0)))
    assert world.reported == [(0, 55.0, [7])]
    assert seconds["compute"] == COMPUTE_S


def test_rows_that_are_announced_before_they_are_there_are_wait_activation() -> None:
    world = World()
    world.rows_late_s = 5
    seconds = world.run(world.rows(0), world.plan(decode_plan(0)))
    assert seconds["wait_activation"] == 5
    assert seconds["compute"] == COMPUTE_S


def test_late_activations_are_wait_activation() -> None:
    world = World()
    seconds = world.run(world.plan(decode_plan(0)), lambda: None, world.rows(0))
    assert seconds["wait_activation"] == 2 * WAIT_S + PREPARE_S  # inputs were built meanwhile
    assert seconds["prepare"] == 0
    assert seconds["wait_kv"] == 0


def test_late_kv_is_wait_kv() -> None:
    world = World()
    plan = decode_plan(0, wait_for_load=True)
    seconds = world.run(world.rows(0), world.plan(plan), lambda: None, world.loaded(0))
    assert world.log[-2:] == ["send 0", "report 0"]
    assert seconds["wait_kv"] == 2 * WAIT_S + PREPARE_S
    assert seconds["wait_activation"] == 0


def test_activations_first_then_kv_when_both_are_late() -> None:
    world = World()
    plan = decode_plan(0, wait_for_load=True)
    seconds = world.run(world.plan(plan), world.rows(0), world.loaded(0))
    assert seconds["wait_activation"] == WAIT_S + PREPARE_S
    assert seconds["wait_kv"] == WAIT_S


def test_inputs_that_delay_the_step_are_prepare() -> None:
    world = World()
    seconds = world.run(world.rows(0), world.plan(decode_plan(0)))
    assert seconds["prepare"] == PREPARE_S


def test_inputs_of_the_next_step_are_built_while_waiting() -> None:
    world = World()
    plans = (decode_plan(0), decode_plan(1, slot=1))
    seconds = world.run(world.plan(*plans), world.rows(1), world.rows(0))
    assert world.log == [
        *("prepare 0", "prepare 1"),
        *("compute 0", "send 0", "report 0"),
        *("compute 1", "send 1", "report 1"),
    ]
    assert seconds["prepare"] == 0


def test_steps_keep_the_planned_order_whatever_arrives_first() -> None:
    world = World()
    world.run(
        world.rows(2),
        world.plan(decode_plan(1), decode_plan(2)),
        world.rows(3),
        world.plan(decode_plan(3)),
        world.rows(1),
    )
    assert [step for step, _, _ in world.reported] == [1, 2, 3]


def test_a_plan_out_of_order_is_refused() -> None:
    world = World(takes_activations=False)
    with pytest.raises(InvariantError, match="step 4 was planned after step 4"):
        world.run(world.plan(decode_plan(4), decode_plan(4)))


def test_an_older_epoch_is_ignored() -> None:
    world = World()
    world.queue.reset(5)
    world.run(
        world.plan(decode_plan(0, epoch=4)),
        world.plan(decode_plan(0, epoch=5, wait_for_load=True)),
        world.rows(0, epoch=4),
        world.loaded(0, epoch=4),
    )
    assert world.reported == []
    assert world.log == ["prepare 0"]


@pytest.mark.parametrize("arrived", ["nothing", "activations"])
def test_a_reset_during_a_wait_aborts_the_step(arrived: str) -> None:
    world = World()
    lead = [world.rows(0)] if arrived == "activations" else []
    seconds = world.run(
        world.plan(decode_plan(0, wait_for_load=True), decode_plan(1)),
        *lead,
        world.reset(2),
        world.plan(decode_plan(0, epoch=2)),
        world.rows(0, epoch=2),
    )
    assert [entry for entry in world.log if entry.startswith("compute")] == ["compute 0"]
    assert [step for step, _, _ in world.reported] == [0]
    assert seconds["wait_plan"] == 3 * WAIT_S
    # Inputs are built anew: step 0 of the new epoch is another step.
    assert world.log.count("prepare 0") == 2


def test_inputs_of_void_steps_are_forgotten() -> None:
    world = World()
    script: list[Callable[[], None]] = []
    for epoch in range(2, 12):
        plans = (decode_plan(0, epoch=epoch), decode_plan(1, epoch=epoch))
        script += [world.reset(epoch), world.plan(*plans), lambda: None]
    world.run(*script, world.reset(100))
    assert world.log.count("prepare 1") == 10
    assert world.executor._prepared == {}


def test_stop_ends_a_step_that_waits() -> None:
    world = World()
    world.run(world.plan(decode_plan(0)))
    assert world.log == ["prepare 0"]


def test_rows_that_do_not_match_the_plan_end_the_loop() -> None:
    world = World()
    with pytest.raises(InvariantError, match="3 rows came from the previous stage, 2 tokens"):
        world.run(world.rows(0, count=3), world.plan(decode_plan(0, rows=2)))


def test_states_sum_to_wall_time() -> None:
    world = World()
    steps = 20
    script: list[Callable[[], None]] = []
    for step in range(steps):
        script += [world.plan(decode_plan(step, wait_for_load=step % 3 == 0))]
        script += [world.rows(step), world.loaded(step)]
    seconds = world.run(*script)
    assert len(world.reported) == steps
    assert sum(seconds.values()) == world.now_s
