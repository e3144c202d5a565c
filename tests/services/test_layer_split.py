"""The chosen split is as good as the best of all splits, where there are few enough to try."""

import itertools
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipemax.proto.errors import ConfigError
from pipemax.services.layer_split import (
    TOLERANCE,
    Load,
    Split,
    StageRoom,
    choose_split,
    describe,
)
from pipemax.stage_worker.layer_costs import ModelCosts, PartCost

TOKEN_BYTES = 4


def model(
    layers: int = 12,
    *,
    layer_ms: float = 1.0,
    head_ms: float = 0.0,
    layer_bytes: int = 100,
    head_bytes: int = 0,
    request_us: float = 0.0,
) -> ModelCosts:
    layer = PartCost(fixed_s=layer_ms / 1e3, request_s=request_us / 1e6, prompt_s=layer_ms / 1e6)
    return ModelCosts(
        layers=(layer,) * layers,
        layer_bytes=(layer_bytes,) * layers,
        embedding=PartCost(),
        embedding_bytes=0,
        head=PartCost(fixed_s=head_ms / 1e3),
        head_bytes=head_bytes,
        step=PartCost(fixed_s=1e-4),
    )


def load(max_num_seqs: int = 64, least: int = 1) -> Load:
    return Load(max_num_seqs, prompt_tokens=20, output_tokens=20, least_pool_tokens=least)


AMPLE = StageRoom(limit_bytes=None, pool_bytes=10**9)


def all_splits(layers: int, stages: int) -> Iterator[tuple[int, ...]]:
    for cuts in itertools.combinations(range(1, layers), stages - 1):
        yield tuple(b - a for a, b in itertools.pairwise((0, *cuts, layers)))


def test_equal_stages_get_equal_layers() -> None:
    assert choose_split([model()] * 4, [AMPLE] * 4, TOKEN_BYTES, load()).layers == (3, 3, 3, 3)


def test_the_head_counts_as_the_layers_it_costs() -> None:
    found = choose_split([model(14, head_ms=2.0)] * 4, [AMPLE] * 4, TOKEN_BYTES, load())
    assert found.layers == (4, 4, 4, 2)
    assert found.decode_s == pytest.approx((4.1e-3,) * 4)


def test_a_gpu_of_twice_the_speed_gets_twice_the_layers() -> None:
    slow, fast = model(12), model(12, layer_ms=0.5)
    found = choose_split([slow, fast], [AMPLE] * 2, TOKEN_BYTES, load())
    assert found.layers == (4, 8)


def test_memory_bounds_what_a_fast_gpu_takes() -> None:
    slow, fast = model(12), model(12, layer_ms=0.1)
    rooms = [StageRoom(10**6, None), StageRoom(400, None)]
    found = choose_split([slow, fast], rooms, TOKEN_BYTES, load(least=5))
    assert found.layers == (9, 3)  # a fourth layer leaves no memory for KV
    assert found.pool_tokens == 100 // (TOKEN_BYTES * 3)


def test_where_kv_is_scarce_memory_weighs_more_than_time() -> None:
    """The second stage is 10 % slower, and has much more memory. With room for few requests the
    first gives layers up, whose weights stand in the way of KV; with ample room it does not."""
    costs = [model(12), model(12, layer_ms=1.1)]
    scarce = [StageRoom(800, None), StageRoom(10**6, None)]
    ample = [StageRoom(10**8, None)] * 2
    assert choose_split(costs, ample, TOKEN_BYTES, load()).layers == (6, 6)
    found = choose_split(costs, scarce, TOKEN_BYTES, load())
    even = describe((6, 6), costs, scarce, TOKEN_BYTES, load())
    assert even is not None
    assert found.layers[0] < 6
    assert found.batch > even.batch
    assert max(found.request_s) < max(even.request_s)


def test_of_equally_fast_splits_the_one_with_the_larger_pool() -> None:
    """Time is the third stage's, whatever the other two share out between them."""
    costs = [model(9, layer_ms=0.01), model(9, layer_ms=0.01), model(9, head_ms=50.0)]
    rooms = [StageRoom(10**5, None), StageRoom(10**7, None), StageRoom(10**7, None)]
    found = choose_split(costs, rooms, TOKEN_BYTES, load(max_num_seqs=1))
    assert found.layers == (1, 7, 1)


def test_a_fixed_pool_must_fit_beside_the_weights() -> None:
    costs = [model(4), model(4)]
    rooms = [StageRoom(250, 100), StageRoom(450, 100)]
    assert choose_split(costs, rooms, TOKEN_BYTES, load()).layers == (1, 3)
    with pytest.raises(ConfigError, match=r"no layer split fits: the weights of 400 B"):
        choose_split(costs, [StageRoom(250, 100)] * 2, TOKEN_BYTES, load())


def test_a_large_model_takes_no_time() -> None:
    costs = [model(80, head_ms=3.0, request_us=5.0)] * 8
    rooms = [StageRoom(11_000, None)] * 8
    found = choose_split(costs, rooms, TOKEN_BYTES, load(max_num_seqs=1024))
    assert sum(found.layers) == 80
    assert found.layers[-1] < min(found.layers[:-1])


parts = st.builds(
    PartCost,
    fixed_s=st.floats(0, 1),
    request_s=st.floats(0, 0.1),
    context_s=st.floats(0, 0.01),
    prompt_s=st.floats(0, 0.1),
)


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[ModelCosts], list[StageRoom], Load]:
    layers = draw(st.integers(1, 7))
    stages = draw(st.integers(1, min(4, layers)))
    layer_bytes = draw(st.lists(st.integers(1, 50), min_size=layers, max_size=layers))
    embedding_bytes, head_bytes = draw(st.integers(0, 50)), draw(st.integers(0, 50))
    costs = [
        ModelCosts(
            layers=tuple(draw(st.lists(parts, min_size=layers, max_size=layers))),
            layer_bytes=tuple(layer_bytes),
            embedding=draw(parts),
            embedding_bytes=embedding_bytes,
            head=draw(parts),
            head_bytes=head_bytes,
            step=draw(st.builds(PartCost, fixed_s=st.floats(1e-3, 1))),
        )
        for _ in range(stages)
    ]
    room = st.one_of(
        st.builds(StageRoom, st.integers(0, 2000), st.none()),
        st.builds(StageRoom, st.integers(0, 2000), st.integers(1, 1000)),
        st.builds(StageRoom, st.none(), st.integers(1, 1000)),
    )
    rooms = draw(st.lists(room, min_size=stages, max_size=stages))
    return costs, rooms, Load(draw(st.integers(1, 8)), 4, 6, draw(st.integers(1, 30)))


@given(problems())
def test_no_split_is_better(problem: tuple[list[ModelCosts], list[StageRoom], Load]) -> None:
    costs, rooms, work = problem
    fitting: list[Split] = [
        split
        for layers in all_splits(len(costs[0].layers), len(costs))
        if (split := describe(layers, costs, rooms, TOKEN_BYTES, work)) is not None
    ]
    if not fitting:
        with pytest.raises(ConfigError, match="no layer split fits"):
            choose_split(costs, rooms, TOKEN_BYTES, work)
        return
    found = choose_split(costs, rooms, TOKEN_BYTES, work)
    assert found in fitting
    best_s = min(max(split.request_s) for split in fitting)
    assert max(found.request_s) <= best_s * (1 + TOLERANCE) * (1 + 1e-6)
    fastest = [split for split in fitting if max(split.request_s) <= best_s * (1 + 1e-9)]
    assert found.pool_tokens >= max(split.pool_tokens for split in fastest)
