"""What a step's message tells the last stage about requests with rules, and how often."""

from typing import Any

from pipemax.coordinator.plan_message import build_step_plan
from pipemax.coordinator.request import Request
from pipemax.coordinator.state import Item
from pipemax.proto.messages.control import RowExtras, SampleRules, StepPlan
from pipemax.proto.messages.ingest import SamplingParams
from pipemax.proto.messages.types import pack_i32


def request(key: int = 3, bad_words: tuple[tuple[int, ...], ...] = (), **fields: Any) -> Request:
    made = Request(key, [5, 6, 5], SamplingParams(**fields), 0, 0.0, bad_words=bad_words)
    made.forget_kv(kv_key=1)
    made.table.append(0)
    return made


def plan(*requests: Request, epoch: int = 1, ended: tuple[int, ...] = ()) -> StepPlan:
    items = [Item(r, len(r.tokens) - 1, 1, samples=True) for r in requests]
    return build_step_plan(
        items,
        epoch=epoch,
        step=1,
        slot=0,
        wait_for_load=False,
        block_size=16,
        eos_token_ids=frozenset({2}),
        ended=ended,
    )


def test_plain_requests_bring_nothing() -> None:
    message = plan(request(min_tokens=3), ended=(1,))
    assert message.sample[0].extras is None
    assert message.sample[0].banned_token_ids == (2,)
    assert message.ended == ()


def test_rules_travel_once_an_epoch() -> None:
    ruled = request(repetition_penalty=1.5, logit_bias={7: 1.0, 4: -2.0}, allowed_token_ids=(7, 4))
    first = plan(request(4), ruled, ended=(1, 2))
    ids = pack_i32([7, 4])
    rules = SampleRules(0.0, 0.0, 1.5, pack_i32([5, 6]), b"", ids, (1.0, -2.0), ids)
    assert [row.extras for row in first.sample] == [None, RowExtras(3, rules)]
    assert first.ended == (1, 2)
    ruled.tokens.append(8)
    assert plan(ruled).sample[0].extras == RowExtras(3)
    again = plan(ruled, epoch=2).sample[0].extras
    assert again is not None
    assert again.rules is not None
    assert again.rules.output_token_ids == pack_i32([8])


def test_prompts_travel_for_the_repetition_penalty_only() -> None:
    extras = plan(request(presence_penalty=0.5, bad_words=((9, 1),))).sample[0].extras
    assert extras is not None
    assert extras.rules == SampleRules(0.5, bad_words=(pack_i32([9, 1]),))
