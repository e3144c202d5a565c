"""The queue against a plain model of it, in any order of arrivals and resets."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipemax.proto.errors import InvariantError
from pipemax.stage_worker.step_queue import StepQueue
from support.step_plans import decode_plan

_epochs = st.integers(0, 3)
_steps = st.integers(0, 4)
_events = st.lists(
    st.one_of(
        st.tuples(st.just("reset"), _epochs, _steps),
        st.tuples(st.sampled_from(["plan", "rows", "loaded"]), _epochs, _steps),
    ),
    max_size=40,
)


@given(_events, st.booleans())
def test_a_plan_misses_exactly_what_did_not_come_in_its_epoch(
    events: list[tuple[str, int, int]], takes_activations: bool
) -> None:
    queue = StepQueue(takes_activations=takes_activations)
    epoch, planned = -1, -1
    came: dict[str, set[int]] = {"rows": set(), "loaded": set()}
    plans: list[Any] = []
    for kind, event_epoch, step in events:
        if kind == "reset":
            queue.reset(event_epoch)
            epoch, planned, plans = event_epoch, -1, []
            came = {"rows": set(), "loaded": set()}
        elif kind == "plan":
            plan = decode_plan(step, epoch=event_epoch, wait_for_load=step % 2 == 0)
            if event_epoch == epoch and step <= planned:
                with pytest.raises(InvariantError):
                    queue.add_plan(plan)
                continue
            queue.add_plan(plan)
            if event_epoch == epoch:
                plans.append(plan)
                planned = step
        else:
            if kind == "rows":
                queue.add_rows(event_epoch, step, torch.zeros(1, 1))
            else:
                queue.add_loaded(event_epoch, step)
            if event_epoch == epoch:
                came[kind].add(step)
        assert list(queue.plans) == plans
        for plan in plans:
            expected = None
            if takes_activations and plan.step not in came["rows"]:
                expected = "wait_activation"
            elif plan.wait_for_load and plan.step not in came["loaded"]:
                expected = "wait_kv"
            assert queue.missing(plan) == expected


def test_what_is_finished_is_forgotten() -> None:
    queue = StepQueue(takes_activations=True)
    queue.reset(1)
    plan = decode_plan(0, wait_for_load=True)
    queue.add_rows(1, 0, torch.zeros(1, 1))
    queue.add_loaded(1, 0)
    queue.add_plan(plan)
    assert queue.missing(plan) is None
    queue.finish(plan)
    assert queue.next_plan is None
    assert queue.missing(plan) == "wait_activation"
