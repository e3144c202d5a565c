"""Output lengths by hazards, and the blocks expected at the worst moment, against exact sums."""

import math
import random
import statistics
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipemax.coordinator import forecast as module
from pipemax.coordinator.forecast import MAX_KINDS, Forecast
from pipemax.coordinator.request import Request
from pipemax.proto.messages.ingest import SamplingParams

BLOCK = 16


def request(key: int, prompt_len: int = 100, max_tokens: int = 2048, job: int = 0) -> Request:
    sampling = SamplingParams(max_tokens=max_tokens)
    return Request(key, [1] * prompt_len, sampling, 0, 0.0, job)


def grow(forecast: Forecast, one: Request, tokens: int) -> None:
    for _ in range(tokens):
        one.tokens.append(1)
        forecast.grown(one)


def live(forecast: Forecast, one: Request, length: int) -> None:
    """A whole life, alone."""
    forecast.add(one)
    grow(forecast, one, length)
    forecast.finished(one)
    forecast.remove(one)


def expected_outputs(forecast: Forecast, max_tokens: int = 2048, job: int = 0) -> float:
    """Of a new request, while no others run."""
    probe = request(10**6, 1000, max_tokens, job)
    forecast.add(probe)
    mean = 1000 / forecast.prefill_per_output
    forecast.remove(probe)
    return mean


def lognormal(mean: float, sigma: float, seed: int = 0) -> Callable[[], int]:
    draw = random.Random(seed)
    mu = math.log(mean) - sigma**2 / 2
    return lambda: min(2048, max(1, round(draw.lognormvariate(mu, sigma))))


def test_the_mean_is_learned_from_whole_lives() -> None:
    forecast = Forecast(BLOCK)
    draw = lognormal(237, 0.8)
    lengths = [draw() for _ in range(600)]
    for key, length in enumerate(lengths):
        live(forecast, request(key), length)
    assert expected_outputs(forecast) == pytest.approx(statistics.mean(lengths), rel=0.04)


@pytest.mark.parametrize("sigma", [0.3, 0.8])
@pytest.mark.parametrize("seed", range(4))
def test_a_cohort_that_progresses_in_step_is_not_judged_by_those_who_ended(
    sigma: float, seed: int
) -> None:
    """All start together, so the short ones are the first to end: the mean of those that ended
    would be far too small."""
    forecast = Forecast(BLOCK)
    draw = lognormal(237, sigma, seed)
    lengths = {key: draw() for key in range(400)}
    running = {key: request(key) for key in lengths}
    for one in running.values():
        forecast.add(one)
    ended: list[int] = []
    while len(ended) < 200:
        for key, one in list(running.items()):
            grow(forecast, one, 1)
            if one.num_outputs == lengths[key]:
                forecast.finished(one)
                forecast.remove(one)
                del running[key]
                ended.append(lengths[key])
    naive = statistics.mean(ended)
    for one in running.values():
        forecast.remove(one)
    mean, true_mean = expected_outputs(forecast), statistics.mean(lengths.values())
    assert naive < 0.85 * true_mean
    assert mean == pytest.approx(true_mean, rel=0.2)


def test_lengths_that_are_all_the_same_are_known_to_a_bucket() -> None:
    """Also where a bucket ends with the length."""
    for length in (128, 200, 250):
        forecast = Forecast(BLOCK)
        for key in range(40):
            live(forecast, request(key, max_tokens=512), length)
        assert expected_outputs(forecast, 512) == pytest.approx(length, abs=BLOCK)


def test_before_anything_is_known_most_of_what_is_allowed_is_expected() -> None:
    forecast = Forecast(BLOCK)
    assert expected_outputs(forecast, 512) == pytest.approx(512 * (1 - 1 / math.e), rel=0.03)


def test_what_is_cancelled_or_preempted_teaches_no_length() -> None:
    forecast = Forecast(BLOCK)
    for key in range(40):
        live(forecast, request(key, max_tokens=512), 200)
    before = expected_outputs(forecast, 512)
    for key in range(40, 80):
        one = request(key, max_tokens=512)
        forecast.add(one)
        grow(forecast, one, 100)
        forecast.remove(one)
    assert expected_outputs(forecast, 512) == pytest.approx(before, abs=1)


def test_jobs_do_not_mix() -> None:
    forecast = Forecast(BLOCK)
    for key in range(80):
        live(forecast, request(key, max_tokens=512, job=key % 2), 50 if key % 2 else 400)
    assert expected_outputs(forecast, 512, job=1) == pytest.approx(50, abs=BLOCK)
    assert expected_outputs(forecast, 512, job=0) == pytest.approx(400, abs=BLOCK)


def test_kinds_of_which_none_runs_are_forgotten_when_there_are_too_many() -> None:
    forecast = Forecast(BLOCK)
    kept = request(0, job=0)
    forecast.add(kept)
    grow(forecast, kept, 40)
    for job in range(1, 10 * MAX_KINDS):
        live(forecast, request(job, job=job), 3)
    assert len(forecast._kinds) <= MAX_KINDS
    assert forecast.check({0: kept})


def sure_forecast(
    lengths: dict[int, int], max_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> Forecast:
    """One that has seen many lives of each job, all alike, and adds no margin."""
    monkeypatch.setattr(module, "MARGIN", 0.0)
    forecast = Forecast(BLOCK)
    for job, length in lengths.items():
        for key in range(30):
            live(forecast, request(1000 * job + key, max_tokens=max_tokens, job=job), length)
    return forecast


def exact_peak(running: Sequence[tuple[int, int, int]]) -> float:
    """The most blocks held at any time by requests of such prompts, ages and lengths, each of which
    grows by a token at a time and then goes."""
    return max(
        sum(-(-(prompt + age + t) // BLOCK) for prompt, age, length in running if age + t < length)
        for t in range(max(length - age for _, age, length in running))
    )


@given(
    ages=st.lists(st.tuples(st.integers(1, 400), st.integers(0, 255)), min_size=1, max_size=30),
    newcomer=st.integers(1, 400),
)
def test_the_peak_is_exact_where_lengths_are_certain(
    ages: list[tuple[int, int]], newcomer: int
) -> None:
    """Two jobs of outputs of 128 and 256 tokens. Off by the rounding to buckets at most: half a
    block and half a bucket for each request, and a whole bucket in when it goes."""
    with pytest.MonkeyPatch.context() as patch:
        lengths = {1: 128, 2: 256}
        forecast = sure_forecast(lengths, 256, patch)
        running = []
        for key, (prompt_len, age) in enumerate(ages):
            job = 1 + key % 2
            one = request(key, prompt_len, 256, job)
            forecast.add(one)
            grow(forecast, one, age % lengths[job])
            running.append((prompt_len, one.num_outputs, lengths[job]))
        tolerance = 1.5 * len(running)
        assert forecast.peak_blocks() == pytest.approx(exact_peak(running), abs=tolerance)
        running.append((newcomer, 0, 256))
        peak = forecast.peak_blocks(request(9999, newcomer, 256, 2))
        assert peak == pytest.approx(exact_peak(running), abs=tolerance + 1.5)


@given(
    data=st.lists(
        st.tuples(st.integers(1, 300), st.integers(0, 60), st.integers(0, 2)), max_size=20
    ),
    newcomer=st.tuples(st.integers(1, 300), st.integers(1, 3)),
)
def test_the_peak_with_a_newcomer_is_the_peak_once_it_runs(
    data: list[tuple[int, int, int]], newcomer: tuple[int, int]
) -> None:
    """Whatever limits the kinds have: those of the newcomer may be the coarsest."""
    forecast = Forecast(BLOCK)
    for key, (prompt_len, age, job) in enumerate(data):
        one = request(key, prompt_len, 64 << (2 * job), job)
        forecast.add(one)
        grow(forecast, one, age)
    forecast.peak_blocks()
    prompt_len, size = newcomer
    one = request(9999, prompt_len, 64 << (2 * size), 7)
    asked = forecast.peak_blocks(one)
    forecast.add(one)
    assert asked == pytest.approx(forecast.peak_blocks(), rel=1e-9)


def test_the_margin_covers_most_outcomes_and_is_small_for_many_requests() -> None:
    """Against a Monte Carlo of the same lognormal lengths."""
    forecast, draw = Forecast(BLOCK), lognormal(237, 0.8)
    for key in range(500):
        live(forecast, request(key), draw())
    running = [request(1000 + key) for key in range(60)]
    for one in running:
        forecast.add(one)
    peaks = [exact_peak([(100, 0, draw()) for _ in running]) for _ in range(40)]
    peak = forecast.peak_blocks()
    assert sum(p <= peak for p in peaks) >= 24
    assert peak <= 1.2 * statistics.mean(peaks)


def test_ages_are_kept_up_to_date() -> None:
    forecast = Forecast(BLOCK)
    one, other = request(0), request(1)
    forecast.add(one)
    forecast.add(other)
    grow(forecast, one, 500)
    assert forecast.check({0: one, 1: other})
    one.tokens.extend([1] * 100)
    assert not forecast.check({0: one, 1: other})
    assert not forecast.check({1: other})
