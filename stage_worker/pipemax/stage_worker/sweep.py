"""The warm-up sweep: a stage times synthetic steps before any work, so that the scheduler can
predict from the first step on. Running them also compiles kernels and packs weights.

Decode steps hold the first and the last rows of the GEMM tiles that real batches will fill, over
short and long contexts; prompt chunks are short, long, and behind a long context. Block tables
walk through the whole pool in random order, so that KV is read from memory as in real work.

A stage sweeps as soon as it is loaded and waits for nobody. Stages load alike, so they mostly sweep
together and share cores, memory bandwidth or power as they will at work, which one after the other
would hide. What a neighbour that still loads disturbs is not like work; therefore every step is
timed twice, in two passes, and the smaller time counts. The rest is corrected by the first real
steps: to the cost model the whole sweep weighs as much as two of them.

Imports no torch: the simulator models the same sweep.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from pipemax.proto.config import EngineConfig
from pipemax.proto.geometry import blocks_for
from pipemax.proto.messages.control import SampleRow, StepPlan, SweepSample
from pipemax.proto.messages.types import pack_i32

if TYPE_CHECKING:
    from pipemax.stage_worker.channels.ring import Rows
    from pipemax.stage_worker.executor import StepWork

TILE_ROWS = 128
_MOST_TILES = 8
"""Tiles whose edges are swept; batches that decode more rows are rare."""
_SHORT_TOKENS = 64
"""A short context."""
_FEW_ROWS = (1, 8, 32, 64)
_CHUNKS_TOKENS = (64, 256, 512)
_LEAST_STEPS = 2
"""Timed however slow the model is: with fewer nothing could be told from anything."""
_CONTEXT_PER_ROW = 256
"""Context tokens taken to cost about what one row does; only used to guess what is too slow."""

Batch = TypeVar("Batch")


@dataclass(frozen=True, slots=True)
class SweepLimits:
    """What bounds real steps on this stage."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    num_blocks: int
    """Of the stage's pool."""
    block_size: int

    @classmethod
    def of(cls, config: EngineConfig, num_blocks: int) -> "SweepLimits":
        return cls(
            config.max_num_seqs,
            config.max_num_batched_tokens,
            config.max_model_len,
            num_blocks,
            config.block_size,
        )


@dataclass(frozen=True, slots=True)
class SweepShape:
    """A step of either equal decodes or one prompt chunk."""

    items: int
    """Requests: one for a prompt chunk."""
    tokens: int
    """New tokens of each."""
    context_len: int
    """Tokens each has in the KV cache already."""

    @property
    def rows(self) -> int:
        return self.items * self.tokens

    @property
    def size(self) -> float:
        """A rough measure of its cost, to order shapes by."""
        return self.rows + self.items * self.context_len / _CONTEXT_PER_ROW

    @property
    def is_decode(self) -> bool:
        """To the cost model every item of one token is."""
        return self.tokens == 1

    @property
    def pairs(self) -> int:
        """Over all new tokens, the tokens each attends to."""
        each = self.tokens * self.context_len + self.tokens * (self.tokens + 1) // 2
        return self.items * each

    def sample(self, compute_s: float) -> SweepSample:
        if self.is_decode:
            return SweepSample(self.rows, self.pairs, 0, 0, compute_s)
        return SweepSample(0, 0, self.rows, self.pairs, compute_s)


def sweep_shapes(limits: SweepLimits) -> list[SweepShape]:
    """What to time, cheap ones first. Never empty."""
    found = {*_decode_shapes(limits), *_chunk_shapes(limits)}
    return sorted(found, key=lambda s: (s.size, s.rows, s.context_len))


def _decode_shapes(limits: SweepLimits) -> Iterator[SweepShape]:
    most = min(limits.max_num_seqs, limits.max_num_batched_tokens, limits.num_blocks)
    most = min(most, _MOST_TILES * TILE_ROWS)
    edges = {most, *range(TILE_ROWS, most, TILE_ROWS), *range(TILE_ROWS + 1, most, TILE_ROWS)}
    with_long = {1, _FEW_ROWS[1], _FEW_ROWS[3], TILE_ROWS, most}
    for rows in sorted({*_FEW_ROWS, *edges}):
        if rows > most:
            break
        longest = _longest(limits, limits.num_blocks // rows) - 1
        yield SweepShape(rows, 1, min(_SHORT_TOKENS, longest))
        if rows in with_long:
            yield SweepShape(rows, 1, longest)


def _chunk_shapes(limits: SweepLimits) -> Iterator[SweepShape]:
    longest = _longest(limits, limits.num_blocks)
    most = min(limits.max_num_batched_tokens, longest)
    for tokens in sorted({min(most, chunk) for chunk in (*_CHUNKS_TOKENS, most)} - {1}):
        yield SweepShape(1, tokens, 0)
        if tokens <= _CHUNKS_TOKENS[1] and longest >= 2 * tokens:
            yield SweepShape(1, tokens, longest - tokens)


def _longest(limits: SweepLimits, num_blocks: int) -> int:
    """Tokens of a request that gets so many blocks."""
    return min(limits.max_model_len, num_blocks * limits.block_size)


def time_shapes(
    shapes: Sequence[SweepShape],
    run: Callable[[SweepShape], float],
    limit_s: float,
    now_s: Callable[[], float],
) -> tuple[SweepSample, ...]:
    """Samples of the `shapes`, which come cheap ones first, as far as `limit_s` seconds go. `run`
    runs a step and returns its compute time; `now_s` is a monotonic clock.

    Half of the time is for a first pass, which ends before a shape that is expected to take longer
    than what is left of it; the rest for doing the same again.
    """
    if limit_s <= 0 or not shapes:
        return ()
    begin_s = now_s()
    run(shapes[0])  # the first step of all compiles and allocates
    timed: list[tuple[SweepShape, float]] = []
    for shape in shapes:
        left_s = begin_s + limit_s / 2 - now_s()
        if len(timed) >= _LEAST_STEPS and _at_most_s(shape, timed[-1]) > left_s:
            break
        timed.append((shape, run(shape)))
    samples: list[SweepSample] = []
    for shape, first_s in timed:
        again = now_s() + first_s <= begin_s + limit_s
        least_s = min(first_s, run(shape)) if again else first_s
        if least_s > 0:  # else the clock is too coarse for it
            samples.append(shape.sample(least_s))
    return tuple(samples)


def _at_most_s(shape: SweepShape, smaller: tuple[SweepShape, float]) -> float:
    """As if all time went by size; a part of it is fixed."""
    before, seconds = smaller
    return seconds * max(1.0, shape.size / before.size)


def sweep(
    work: "StepWork[Batch]",
    limits: SweepLimits,
    vocab_size: int,
    rows: "Callable[[int], Rows | None]",
    limit_s: float,
    now_s: Callable[[], float],
) -> tuple[SweepSample, ...]:
    """Times synthetic steps of `work` for at most `limit_s` seconds, but for the few that are made
    in any case; 0 makes none. Writes to blocks all over the pool, so nothing may be in it yet.
    Tokens are random: with all alike, a mixture of experts would use few of them.

    `rows(n)` stands for n rows `[n, hidden]` from the stage before; None on stage 0.
    """
    draw = random.Random(limits.num_blocks)
    blocks = draw.sample(range(limits.num_blocks), limits.num_blocks)

    def run(shape: SweepShape) -> float:
        tokens = draw.choices(range(vocab_size), k=shape.rows)
        plan = synthetic_plan(shape, limits.block_size, blocks, tokens)
        batch, hidden = work.prepare(plan), rows(shape.rows)
        start_s = now_s()
        told_s = work.compute(plan, batch, hidden).compute_s
        return now_s() - start_s if told_s is None else told_s

    return time_shapes(sweep_shapes(limits), run, limit_s, now_s)


def synthetic_plan(
    shape: SweepShape, block_size: int, blocks: Sequence[int], token_ids: Sequence[int]
) -> StepPlan:
    """A step of this shape over the first of `blocks`, which no two requests share."""
    blocks_each = blocks_for(shape.context_len + shape.tokens, block_size)
    return StepPlan(
        epoch=0,
        step=0,
        slot=0,
        wait_for_load=False,
        num_tokens=pack_i32([shape.tokens] * shape.items),
        context_lens=pack_i32([shape.context_len] * shape.items),
        block_counts=pack_i32([blocks_each] * shape.items),
        block_tables=pack_i32(blocks[: shape.items * blocks_each]),
        token_ids=pack_i32(token_ids),
        sample=tuple(SampleRow(item, 0, 0, 0.0, 0, 1.0, 0.0) for item in range(shape.items)),
    )
