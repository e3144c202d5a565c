"""Rules of requests against a float64 reference over whole histories, and who keeps what."""

from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipemax.proto.errors import InvariantError
from pipemax.proto.messages.control import RowExtras, SampleRow, StepPlan
from pipemax.proto.messages.types import unpack_f32, unpack_i32
from pipemax.stage_worker.sampling import Sampler, is_plain_greedy
from pipemax.stage_worker.sampling.rules import TokenRules
from support.sampling_reference import Rules, probabilities
from support.step_plans import decode_plan

VOCAB = 20
DRAWS = 4000
tokens = st.integers(0, VOCAB - 1)


@st.composite
def rules(draw: st.DrawFn) -> Rules:
    return Rules(
        presence=draw(st.sampled_from([0.0, 0.5, -2.0])),
        frequency=draw(st.sampled_from([0.0, 0.25, -1.5])),
        repetition=draw(st.sampled_from([1.0, 1.3, 0.5])),
        biases=draw(st.dictionaries(tokens, st.sampled_from([-100.0, -1.0, 3.5]), max_size=4)),
        allowed=tuple(draw(st.lists(tokens, max_size=6))),
        bad_words=tuple(
            tuple(word) for word in draw(st.lists(st.lists(tokens, min_size=1, max_size=3)))
        ),
        prompt=tuple(draw(st.lists(tokens, max_size=30))),
    )


def row(
    position: int = 0, seed: int = 0, extras: RowExtras | None = None, **more: Any
) -> SampleRow:
    values = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **more}
    return SampleRow(item=0, seed=seed, position=position, extras=extras, **values)


def plan(*rows: SampleRow, **fields: Any) -> StepPlan:
    return msgspec.structs.replace(decode_plan(1), sample=rows, **fields)


@settings(max_examples=300)
@given(
    rule=rules(),
    output=st.lists(tokens, max_size=40),
    sent=st.integers(0, 40),
    banned=st.lists(tokens, max_size=3),
    seed=st.integers(0, 1000),
)
def test_rules_kept_token_by_token_are_the_reference(
    rule: Rules, output: list[int], sent: int, banned: list[int], seed: int
) -> None:
    """However many tokens the rules were sent with, and came to them one by one."""
    logits = (np.random.default_rng(seed).standard_normal(VOCAB) * 3).astype(np.float32)
    kept = TokenRules(rule.message(output[:sent]))
    for token in output[sent:]:
        kept.append(token)
    assert kept.num_outputs == len(output)
    changed = logits.copy()
    kept.apply(changed, banned)
    expected = rule.apply(logits, output, banned)
    assert np.array_equal(np.isfinite(changed), np.isfinite(expected))
    possible = np.isfinite(expected)
    assert changed[possible] == pytest.approx(expected[possible], rel=1e-5, abs=1e-5)


def test_more_tokens_than_at_first_have_room() -> None:
    rule = Rules(presence=1.0, frequency=0.5, repetition=1.2)
    kept = TokenRules(rule.message([]))
    output = [i % 700 for i in range(1000)]
    for token in output:
        kept.append(token)
    logits = np.linspace(-2, 2, 1000, dtype=np.float32)
    expected = rule.apply(logits, output)
    kept.apply(logits, ())
    assert logits == pytest.approx(expected, abs=1e-5)


HISTORY = [3, 3, 7, 1, 3, 9]
RULES = [
    Rules(presence=1.5),
    Rules(frequency=0.7),
    Rules(frequency=-0.7, presence=-0.5),
    Rules(repetition=1.8, prompt=(0, 2, 4, 6)),
    Rules(repetition=0.6, prompt=(5,)),
    Rules(biases={4: 2.5, 8: -3.0}),
    Rules(allowed=(2, 3, 5, 7, 11, 13)),
    Rules(bad_words=((9,), (3, 9, 4), (9, 5), (1, 6))),
    Rules(1.0, 0.5, 1.4, {3: 2.0, 6: 1.0}, (3, 5, 6, 7, 9), ((9, 5),), (5, 6)),
]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize(
    "more",
    [{}, {"temperature": 0.6, "top_k": 8, "top_p": 0.9, "min_p": 0.02, "banned_token_ids": (5, 0)}],
    ids=["alone", "combined"],
)
def test_draws_follow_the_distribution(rule: Rules, more: dict[str, Any]) -> None:
    """Pearson's statistic over 4,000 seeds; 60 is far out for at most 19 degrees of freedom."""
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(4)) * 1.5
    extras = [RowExtras(request, rule.message(HISTORY)) for request in range(DRAWS)]
    rows = [row(len(HISTORY), seed, extra, **more) for seed, extra in enumerate(extras)]
    drawn = Sampler().sample(plan(*rows), logits.expand(DRAWS, VOCAB)).tokens
    changed = rule.apply(logits.numpy(), HISTORY, rows[0].banned_token_ids)
    expected = probabilities(changed, rows[0]) * DRAWS
    counts = np.bincount(drawn, minlength=VOCAB)
    assert (counts[expected == 0] == 0).all()
    possible = expected > 0
    assert ((counts - expected)[possible] ** 2 / expected[possible]).sum() < 60


def test_greedy_rows_obey_rules_too() -> None:
    logits = torch.tensor([[5.0, 4.0, 3.0]]).repeat(2, 1)
    rule = Rules(biases={2: 3.0}).message([])
    rows = (row(temperature=0.0), row(temperature=0.0, extras=RowExtras(1, rule)))
    before = logits.clone()
    assert Sampler().sample(plan(*rows), logits).tokens == [0, 2]
    assert torch.equal(logits, before)
    assert [is_plain_greedy(r) for r in (*rows, row())] == [True, False, False]


def test_bad_words_give_way_when_nothing_else_is_left() -> None:
    rule = Rules(allowed=(4,), bad_words=((4,),)).message([])
    step = plan(row(extras=RowExtras(1, rule)))
    assert Sampler().sample(step, torch.zeros(1, VOCAB)).tokens == [4]


def test_what_was_sampled_counts() -> None:
    """Rules are sent once; after that the sampler's own tokens change them."""
    sampler = Sampler()
    logits = torch.linspace(1, 0, 5)[None]
    picked = []
    for position in range(5):
        sent = Rules(presence=2.0).message([]) if position == 0 else None
        step = plan(row(position, temperature=0.0, extras=RowExtras(7, sent)))
        picked += sampler.sample(step, logits).tokens
    assert picked == [0, 1, 2, 3, 4]
    with pytest.raises(InvariantError, match="request 7 has 9 output tokens, its rules 5"):
        sampler.sample(plan(row(9, extras=RowExtras(7))), logits)


def test_rules_are_forgotten_with_their_request_and_with_the_epoch() -> None:
    sampler = Sampler()
    logits = torch.zeros(2, VOCAB)
    sent = Rules(presence=1.0).message([])
    sampler.sample(plan(*(row(extras=RowExtras(key, sent)) for key in (1, 2))), logits)
    assert sampler.num_kept == 2
    sampler.sample(plan(row(1, extras=RowExtras(2)), row(), ended=(1, 5)), logits)
    assert sampler.num_kept == 1
    with pytest.raises(InvariantError, match=r"request 2 .* never sent"):
        sampler.sample(plan(row(2, extras=RowExtras(2)), row(), epoch=4), logits)
    assert sampler.num_kept == 0


def test_only_some_rows_of_a_plan() -> None:
    sampler = Sampler()
    sent = Rules(allowed=(6,)).message([])
    rows = (row(temperature=0.0), row(extras=RowExtras(1, sent)), row(temperature=0.0))
    logits = torch.zeros(2, VOCAB)
    logits[1, 3] = 1.0
    assert sampler.sample(plan(*rows), logits, (1, 2)).tokens == [6, 3]


def test_logprobs_are_of_the_logits_as_they_came() -> None:
    """Whatever the temperature, the cuts and the rules; for whoever asks, as many as asked."""
    logits = torch.randn(40, VOCAB, generator=torch.Generator().manual_seed(6)) * 3
    rule = Rules(presence=1.0, biases={3: 5.0}).message([4])
    wanted = [-1, 0, 3, 50]
    extras = [RowExtras(i if i % 3 else -1, rule, wanted[i % 4]) for i in range(39)]
    rows = [row(i % 3 and 1, i, e, temperature=i % 2, top_k=5) for i, e in enumerate(extras)]
    found = Sampler().sample(plan(*rows, row()), logits)
    table = torch.log_softmax(logits.double(), dim=-1).numpy()
    assert [one.row for one in found.logprobs] == [i for i in range(39) if i % 4]
    for one in found.logprobs:
        own, *likeliest = unpack_i32(one.token_ids)
        order = np.argsort(-table[one.row], kind="stable")
        assert own == found.tokens[one.row]
        assert likeliest == order[: wanted[one.row % 4]].tolist()
        assert one.rank == order.tolist().index(own) + 1
        expected = table[one.row][[own, *likeliest]]
        assert list(unpack_f32(one.logprobs)) == pytest.approx(expected, abs=1e-5)


def test_targets_are_scored_and_not_sampled() -> None:
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(7))
    target = RowExtras(num_logprobs=1, rows_back=1, target=9)
    rows = (row(temperature=0.0, extras=target), row(temperature=0.0), row(extras=target))
    found = Sampler().sample(plan(*rows), logits)
    assert found.tokens == [9, int(logits[1].argmax()), 9]
    assert [one.row for one in found.logprobs] == [0, 2]
    assert [unpack_i32(one.token_ids)[0] for one in found.logprobs] == [9, 9]
    assert Sampler().sample(plan(rows[0]), logits[:1]).tokens == [9]
