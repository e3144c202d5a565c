"""The warm-up sweep: what it times, and how long it may take."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipemax.proto.geometry import blocks_for
from pipemax.proto.messages.control import SweepSample
from pipemax.proto.messages.types import unpack_i32
from pipemax.stage_worker.batch import prepare_batch
from pipemax.stage_worker.sweep import (
    SweepLimits,
    SweepShape,
    sweep_shapes,
    synthetic_plan,
    time_shapes,
)

LARGE = SweepLimits(
    max_num_seqs=300,
    max_num_batched_tokens=2048,
    max_model_len=4096,
    num_blocks=40_000,
    block_size=16,
)


class VirtualStage:
    """Steps take what `seconds` says; preparing takes nothing."""

    def __init__(self, seconds: Callable[[SweepShape], float]) -> None:
        self.now = 7.0
        self.runs: list[SweepShape] = []
        self._seconds = seconds

    def run(self, shape: SweepShape) -> float:
        self.runs.append(shape)
        taken_s = self._seconds(shape)
        self.now += taken_s
        return taken_s

    def sweep(self, limit_s: float, limits: SweepLimits = LARGE) -> tuple[SweepSample, ...]:
        return time_shapes(sweep_shapes(limits), self.run, limit_s, lambda: self.now)


@given(
    st.builds(
        SweepLimits,
        max_num_seqs=st.integers(1, 2000),
        max_num_batched_tokens=st.integers(1, 5000),
        max_model_len=st.integers(1, 5000),
        num_blocks=st.integers(1, 3000),
        block_size=st.integers(1, 256),
    )
)
def test_every_shape_is_a_step_that_could_be_planned(limits: SweepLimits) -> None:
    shapes = sweep_shapes(limits)
    assert shapes
    assert len(shapes) <= 256  # as many as the message takes
    assert [s.size for s in shapes] == sorted(s.size for s in shapes)
    for shape in shapes:
        assert 1 <= shape.items <= limits.max_num_seqs
        assert shape.rows <= limits.max_num_batched_tokens
        assert shape.context_len + shape.tokens <= limits.max_model_len
        blocks = blocks_for(shape.context_len + shape.tokens, limits.block_size)
        assert shape.items * blocks <= limits.num_blocks


def test_the_edges_of_the_tiles_and_both_ends_of_contexts_are_swept() -> None:
    shapes = sweep_shapes(LARGE)
    decodes = {shape.rows for shape in shapes if shape.is_decode}
    assert {1, 128, 129, 256, 257, 300} <= decodes
    contexts = {shape.context_len for shape in shapes if shape.is_decode and shape.rows == 1}
    assert max(contexts) == 4095
    assert min(contexts) == 64
    assert any(not s.is_decode and s.rows == 2048 and s.context_len == 0 for s in shapes)
    assert any(not s.is_decode and s.context_len > 3000 for s in shapes)


@pytest.mark.parametrize("shape", [SweepShape(5, 1, 40), SweepShape(1, 100, 60)])
def test_a_synthetic_step_is_what_its_sample_says(shape: SweepShape) -> None:
    blocks = list(range(49, -1, -1))
    tokens = list(range(shape.rows))
    batch = prepare_batch(synthetic_plan(shape, 16, blocks, tokens), 16)
    positions = batch.position_ids[0].tolist()
    sample = shape.sample(0.5)
    assert sample.decode_requests + sample.prefill_tokens == batch.num_tokens
    assert sample.context_tokens + sample.prefill_pairs == sum(p + 1 for p in positions)
    used = unpack_i32(batch.runs.blocks.tobytes())
    assert len(set(used)) == len(used)
    assert set(used) == set(blocks[: len(used)])


def test_two_passes_and_the_smaller_time_counts() -> None:
    disturbed: set[SweepShape] = set()

    def seconds(shape: SweepShape) -> float:
        first = shape not in disturbed
        disturbed.add(shape)
        return 2e-3 if first else 1e-3

    stage = VirtualStage(seconds)
    samples = stage.sweep(10.0)
    assert len(samples) == len(sweep_shapes(LARGE))
    assert {sample.compute_s for sample in samples} == {1e-3}


def test_it_stays_within_its_time() -> None:
    stage = VirtualStage(lambda shape: 4e-3 + 2e-3 * shape.size)
    samples = stage.sweep(1.0)
    assert 2 < len(samples) < len(sweep_shapes(LARGE))
    assert stage.now <= 8.0


def test_of_a_slow_model_only_the_cheapest_steps_are_timed() -> None:
    stage = VirtualStage(lambda shape: 30.0)
    samples = stage.sweep(1.0)
    assert len(samples) == 2
    assert len(stage.runs) == 3  # the first of all does not count
    assert max(shape.rows for shape in stage.runs) == 8


def test_no_time_means_no_step() -> None:
    stage = VirtualStage(lambda shape: 1e-3)
    assert stage.sweep(0.0) == ()
    assert stage.runs == []


def test_a_clock_too_coarse_for_a_step_brings_no_sample_of_it() -> None:
    assert VirtualStage(lambda shape: 0.0).sweep(1.0) == ()
