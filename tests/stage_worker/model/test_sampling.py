"""Sampling against reference distributions in float64, and what a draw may depend on."""

import numpy as np
import pytest
import torch

from pipemax.proto.messages.control import SampleRow
from pipemax.stage_worker.sampling import sample
from pipemax.stage_worker.sampling.draw import _kept_tokens, uniform
from support.sampling_reference import probabilities

_DRAWS = 4000


def _row(
    seed: int = 0,
    position: int = 0,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    banned: tuple[int, ...] = (),
) -> SampleRow:
    return SampleRow(0, seed, position, temperature, top_k, top_p, min_p, banned)


_SETTINGS = [
    {},
    {"temperature": 0.5},
    {"temperature": 3.0},
    {"top_k": 3},
    {"top_k": 100},
    {"top_p": 0.6},
    {"min_p": 0.2},
    {"temperature": 0.7, "top_k": 6, "top_p": 0.8, "min_p": 0.05},
    {"temperature": 2.0, "top_k": 4, "top_p": 0.5},
    {"temperature": 2.0, "min_p": 0.5, "top_p": 0.7},
    {"banned": (0, 5)},
]


@pytest.mark.parametrize("settings", _SETTINGS, ids=str)
def test_draws_follow_the_distribution(settings: dict) -> None:
    """Pearson's statistic over 4,000 seeds; 60 is far out for at most 19 degrees of freedom."""
    logits = torch.randn(20, generator=torch.Generator().manual_seed(4)) * 1.5
    rows = [_row(seed, **settings) for seed in range(_DRAWS)]
    tokens = sample(logits.expand(_DRAWS, 20).contiguous(), rows)
    expected = probabilities(logits.numpy(), rows[0]) * _DRAWS
    counts = np.bincount(tokens, minlength=20)
    assert (counts[expected == 0] == 0).all()
    possible = expected > 0
    statistic = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    assert statistic < 60


def test_uniform_numbers_are_uniform_over_seeds_and_positions() -> None:
    for numbers in (
        [uniform(seed, 0) for seed in range(_DRAWS)],
        [uniform(7, position) for position in range(_DRAWS)],
        [uniform(seed, seed) for seed in range(_DRAWS)],
    ):
        counts = np.histogram(numbers, bins=20, range=(0.0, 1.0))[0]
        assert counts.sum() == _DRAWS
        assert ((counts - _DRAWS / 20) ** 2 / (_DRAWS / 20)).sum() < 60
        assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.06
    assert uniform(2**64 - 1, 3) != uniform(2**64 - 2, 3)


def test_a_draw_depends_on_nothing_but_seed_and_position() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(40, 300, generator=generator)
    rows = [
        _row(seed, seed % 5, temperature=seed % 4 / 2, top_k=seed % 7, top_p=1 - seed % 3 / 4)
        for seed in range(40)
    ]
    together = sample(logits, rows)
    alone = [sample(logits[i : i + 1], rows[i : i + 1])[0] for i in range(40)]
    backwards = sample(logits.flip(0), rows[::-1])[::-1]
    assert together == alone == backwards == sample(logits, rows)
    other_seeds = sample(logits, [_row(99, temperature=1.0) for _ in rows])
    assert other_seeds != sample(logits, [_row(98, temperature=1.0) for _ in rows])


def test_logits_are_left_as_they_were() -> None:
    logits = torch.randn(3, 50)
    before = logits.clone()
    sample(logits, [_row(banned=(1, 2)), _row(temperature=0.0, banned=(3,)), _row(top_k=3)])
    assert torch.equal(logits, before)


def test_greedy() -> None:
    logits = torch.tensor([[0.0, 3.0, 2.0], [5.0, 1.0, 2.0], [1.0, 1.0, 0.0]])
    assert sample(logits, [_row(temperature=0.0)] * 3) == [1, 0, 0]
    banned = [_row(temperature=0.0, banned=(1,)), _row(temperature=0.0, banned=(0, 2))]
    assert sample(logits[:2], banned) == [2, 1]


@pytest.mark.parametrize("settings", [{"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}], ids=str)
def test_cuts_that_leave_one_token_are_greedy(settings: dict) -> None:
    logits = torch.randn(200, 64, generator=torch.Generator().manual_seed(2))
    rows = [_row(seed, temperature=2.0, **settings) for seed in range(200)]
    assert sample(logits, rows) == logits.argmax(dim=1).tolist()


@pytest.mark.parametrize(
    "settings", [{}, {"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.1}, {"temperature": 0.0}], ids=str
)
def test_all_but_one_banned(settings: dict) -> None:
    logits = torch.linspace(0, 50, 30)[None]
    banned = tuple(token for token in range(30) if token != 4)
    assert sample(logits, [_row(3, banned=banned, **settings)]) == [4]


def test_ties_at_a_cut_go_to_the_smaller_token() -> None:
    logits = torch.zeros(500, 10)
    tokens = sample(logits, [_row(seed, top_k=3) for seed in range(500)])
    assert set(tokens) == {0, 1, 2}
    tokens = sample(logits, [_row(seed, top_p=0.45) for seed in range(500)])
    assert set(tokens) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("shape", ["flat", "steep", "few levels", "one above all", "some zeros"])
@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.9, 0.999999])
def test_top_p_leaves_what_sorting_all_tokens_leaves(shape: str, top_p: float) -> None:
    """Only the likeliest are sorted, found without sorting."""
    draw = np.random.default_rng(3)
    weights = np.exp(draw.standard_normal(3000) * (0.1 if shape == "flat" else 4.0))
    if shape == "few levels":
        weights = np.exp(draw.integers(-6, 0, 3000).astype(np.float64))
    elif shape == "one above all":
        weights[:] = 1e-9
        weights[1234] = 1.0
    elif shape == "some zeros":
        weights[::2] = 0.0
    weights /= weights.max()
    order = np.argsort(-weights, kind="stable")
    before = np.cumsum(weights[order]) - weights[order]
    plain = order[(before < top_p * weights.sum()) & (weights[order] > 0)]
    assert np.array_equal(_kept_tokens(weights, 0, top_p), plain)


def test_extreme_temperatures_and_logits() -> None:
    logits = torch.tensor([[1e30, -1e30, 0.0]])
    assert sample(logits, [_row(1, temperature=1e-6)]) == [0]
    assert sample(logits, [_row(1, temperature=100.0)]) == [0]
    flat = torch.randn(300, 8, generator=torch.Generator().manual_seed(5))
    assert len(set(sample(flat, [_row(seed, temperature=100.0) for seed in range(300)]))) == 8


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("settings", [{}, {"top_k": 5}, {"top_p": 0.5}], ids=str)
def test_broken_logits_harm_their_own_row_only(bad: float, settings: dict) -> None:
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(8))
    rows = [_row(seed, **settings) for seed in range(3)]
    expected = sample(logits, rows)
    logits[1, 7] = bad
    assert sample(logits, rows) == [expected[0], 7, expected[2]]


def test_nothing_to_sample() -> None:
    assert sample(torch.empty(0, 10), []) == []


def test_rows_must_match() -> None:
    with pytest.raises(ValueError, match="2 rows of logits for 1 sample rows"):
        sample(torch.zeros(2, 5), [_row()])
