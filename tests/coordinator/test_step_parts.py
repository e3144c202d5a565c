"""A step comes back in parts, in any order, and is whole once."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipemax.coordinator.step_parts import StepParts, WholeStep
from pipemax.proto.errors import InvariantError
from pipemax.proto.messages.control import NO_TOKEN, RowLogprobs, RowsSampled, StepDone
from pipemax.proto.messages.types import pack_f32, pack_i32


def logprobs(row: int) -> RowLogprobs:
    return RowLogprobs(row, 1, pack_i32([7]), pack_f32([-0.5]))


def done(tokens: list[int], elsewhere: tuple[int, ...] = (), step: int = 3) -> StepDone:
    return StepDone(
        epoch=1,
        step=step,
        stage=1,
        compute_s=0.1,
        state_seconds={},
        tokens=pack_i32(tokens),
        logprobs=tuple(logprobs(row) for row in range(len(tokens)) if row not in elsewhere),
        elsewhere=pack_i32(elsewhere),
    )


def sampled(*rows: int, step: int = 3) -> RowsSampled:
    """Row r gets token 100 + r."""
    return RowsSampled(
        epoch=1,
        step=step,
        rows=pack_i32(rows),
        tokens=pack_i32(100 + row for row in rows),
        logprobs=tuple(map(logprobs, rows)),
    )


def say(parts: StepParts, message: StepDone | RowsSampled) -> WholeStep | None:
    if isinstance(message, StepDone):
        return parts.stage_done(message)
    return parts.rows_sampled(message)


def test_a_step_without_samplers_is_whole_at_once() -> None:
    whole = StepParts().stage_done(done([5, NO_TOKEN]))
    assert whole is not None
    assert list(whole.tokens) == [5, NO_TOKEN]
    assert set(whole.logprobs) == {0, 1}


@given(st.permutations(range(6)))
def test_the_last_part_makes_it_whole_whichever_it_is(order: list[int]) -> None:
    """Two steps at once, each of a stage's report and of two samplers' parts."""
    messages = [
        message
        for step in (3, 4)
        for message in (
            done([5, NO_TOKEN, NO_TOKEN, 6, NO_TOKEN], (1, 2, 4), step),
            sampled(4, 1, step=step),
            sampled(2, step=step),
        )
    ]
    parts = StepParts()
    left = {3: 3, 4: 3}
    for message in (messages[i] for i in order):
        left[message.step] -= 1
        whole = say(parts, message)
        assert (whole is not None) == (left[message.step] == 0)
        if whole is not None:
            assert list(whole.tokens) == [5, 101, 102, 6, 104]
            assert set(whole.logprobs) == set(range(5))


def test_a_reset_voids_what_came_before() -> None:
    parts = StepParts()
    assert parts.rows_sampled(sampled(1)) is None
    parts.reset()
    assert parts.stage_done(done([5, NO_TOKEN], (1,))) is None
    assert parts.rows_sampled(sampled(1)) is not None


@pytest.mark.parametrize(
    "messages",
    [
        (sampled(1), sampled(1)),
        (done([5, NO_TOKEN, NO_TOKEN], (1, 2)), sampled(0)),
        (sampled(0), done([5, NO_TOKEN], (1,))),
        (done([5], (2,)), sampled(2)),
    ],
    ids=["twice", "not sent there", "not sent there, said before", "not in the plan"],
)
def test_parts_that_contradict_each_other_are_noticed(
    messages: tuple[StepDone | RowsSampled, ...],
) -> None:
    parts = StepParts()
    first, second = messages
    say(parts, first)
    with pytest.raises(InvariantError):
        say(parts, second)
