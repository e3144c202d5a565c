"""Which layers each stage gets, from what layers cost on its device. Pure.

A pipeline is as fast as its slowest stage, so what counts is the *time a stage spends on a
request*: its prompt at the stage's prefill rate, and its output tokens at the stage's decode rate
b/t (the end-to-end formula of the performance model, for one stage). Here t is the time of a decode
step of b requests, and b is not free: a micro-batch holds as many requests as the KV pool has
tokens for, and as a device block id means the same on every stage, the pool counts that holds
fewest *tokens*. Where KV is scarce, b grows with that pool while t hardly does, as weights dominate
it: then memory for KV weighs more than a few percent of time. Where it is plentiful, b is
`max_num_seqs` and only time counts.

What offloading adds is left out: it gives every split requests in proportion to t.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

from pipemax.proto.errors import ConfigError
from pipemax.proto.sizes import format_size
from pipemax.stage_worker.layer_costs import ModelCosts

TOLERANCE: Final = 0.01
"""Splits that differ by less in time are taken to be equally fast: measuring is no more exact."""
_BISECTIONS: Final = 48
_NO_BETTER: Final = 1e-9
"""A gain by so little is rounding."""


@dataclass(frozen=True, slots=True)
class StageRoom:
    """What one stage has of its device. Bytes."""

    limit_bytes: int | None
    """Weights and KV pool together; None: memory is no matter."""
    pool_bytes: int | None
    """KV pool; None: what weights leave of the limit."""


@dataclass(frozen=True, slots=True)
class Load:
    """The work that a split is made for."""

    max_num_seqs: int
    """Most requests in one micro-batch."""
    prompt_tokens: float
    """Of a mean request."""
    output_tokens: float
    least_pool_tokens: int
    """The pool must hold this much, however slow that is: the longest request."""

    @property
    def context_tokens(self) -> float:
        """Mean context of a request while it decodes."""
        return self.prompt_tokens + self.output_tokens / 2


@dataclass(frozen=True, slots=True)
class Split:
    """A split and what is expected of it."""

    layers: tuple[int, ...]
    """By stage."""
    pool_tokens: int
    """Of the smallest pool."""
    batch: int
    """Requests in a micro-batch."""
    decode_s: tuple[float, ...]
    """Of a decode step of such a batch, by stage."""
    request_s: tuple[float, ...]
    """Seconds of each stage that one request takes; the pipeline serves one per the largest."""


class _Problem:
    """Costs of intervals of layers by stage, in constant time."""

    def __init__(
        self,
        costs: Sequence[ModelCosts],
        rooms: Sequence[StageRoom],
        layer_token_bytes: int,
        load: Load,
    ) -> None:
        self.num_stages, self.num_layers = len(costs), len(costs[0].layers)
        self.load = load
        self._rooms = rooms
        self._costs = costs
        self._token_bytes = layer_token_bytes
        rows = [
            (
                [cost.fixed_s for cost in model.layers],
                [cost.request_s for cost in model.layers],
                [cost.context_s for cost in model.layers],
                [cost.prompt_s for cost in model.layers],
                list(model.layer_bytes),
            )
            for model in costs
        ]
        self._sums = [[list(accumulate(row, initial=0.0)) for row in stage] for stage in rows]

    def _total(self, column: int, stage: int, first: int, end: int) -> float:
        sums = self._sums[stage][column]
        model = self._costs[stage]
        total = sums[end] - sums[first]
        parts = [model.step]
        if stage == 0:
            parts.append(model.embedding)
        if stage == self.num_stages - 1:
            parts.append(model.head)
        for part in parts:
            total += (part.fixed_s, part.request_s, part.context_s, part.prompt_s)[column]
        return total

    def weights_bytes(self, stage: int, first: int, end: int) -> int:
        model = self._costs[stage]
        layers = int(self._sums[stage][4][end] - self._sums[stage][4][first])
        embedding = model.embedding_bytes if stage == 0 else 0
        head = model.head_bytes if stage == self.num_stages - 1 else 0
        return layers + embedding + head

    def pool_tokens(self, stage: int, first: int, end: int) -> int:
        """Negative when the weights do not fit."""
        room = self._rooms[stage]
        weights = self.weights_bytes(stage, first, end)
        left = None if room.limit_bytes is None else room.limit_bytes - weights
        if room.pool_bytes is None:
            assert left is not None
            return left // (self._token_bytes * (end - first))
        if left is not None and left < room.pool_bytes:
            return -1
        return room.pool_bytes // (self._token_bytes * (end - first))

    def decode_s(self, batch: int, stage: int, first: int, end: int) -> float:
        return (
            self._total(0, stage, first, end)
            + self._total(1, stage, first, end) * batch
            + self._total(2, stage, first, end) * batch * self.load.context_tokens
        )

    def request_s(self, batch: int, stage: int, first: int, end: int) -> float:
        decode_s = self.decode_s(batch, stage, first, end) * self.load.output_tokens / batch
        return decode_s + self._total(3, stage, first, end) * self.load.prompt_tokens

    def most_pool_tokens(self) -> int:
        """No split has more: some stage's pool with a single layer."""
        return min(
            max(self.pool_tokens(stage, n, n + 1) for n in range(self.num_layers))
            for stage in range(self.num_stages)
        )

    def batch_of(self, pool_tokens: int) -> int:
        each = self.num_stages * self.load.context_tokens
        return max(1, min(self.load.max_num_seqs, int(pool_tokens / each)))

    def pool_for(self, batch: int) -> int:
        """Least pool that gives such a batch."""
        least = self.load.least_pool_tokens
        if batch == 1:
            return least
        tokens = int(batch * self.num_stages * self.load.context_tokens)
        while self.batch_of(tokens) < batch:
            tokens += 1
        return max(least, tokens)

    def intervals(self, layers: Sequence[int]) -> Iterator[tuple[int, int, int]]:
        first = 0
        for stage, count in enumerate(layers):
            yield stage, first, first + count
            first += count

    def split(self, layers: Sequence[int]) -> Split | None:
        """None when it does not fit."""
        pool = min(self.pool_tokens(*interval) for interval in self.intervals(layers))
        if pool < self.load.least_pool_tokens:
            return None
        batch = self.batch_of(pool)
        return Split(
            tuple(layers),
            pool,
            batch,
            tuple(self.decode_s(batch, *interval) for interval in self.intervals(layers)),
            tuple(self.request_s(batch, *interval) for interval in self.intervals(layers)),
        )

    def exists(self, fits: Callable[[int, int, int], bool]) -> bool:
        """Whether some split has every stage's interval fit. What fits must still do so with fewer
        layers: then the furthest that a stage gets never falls as it starts later."""
        starts = {0}
        for stage in range(self.num_stages):
            last_end = self.num_layers - (self.num_stages - 1 - stage)
            ends: set[int] = set()
            furthest = 0
            for first in sorted(starts):
                furthest = max(furthest, first)
                while furthest < last_end and fits(stage, first, furthest + 1):
                    furthest += 1
                ends.update(range(first + 1, furthest + 1))
            starts = ends
        return self.num_layers in starts

    def can(self, batch: int, pool_tokens: int, request_s: float) -> bool:
        """Whether a split has such a pool and serves a request in that time in such batches."""

        def fits(stage: int, first: int, end: int) -> bool:
            return (
                self.pool_tokens(stage, first, end) >= pool_tokens
                and self.request_s(batch, stage, first, end) <= request_s
            )

        return self.exists(fits)


def choose_split(
    costs: Sequence[ModelCosts],
    rooms: Sequence[StageRoom],
    layer_token_bytes: int,
    load: Load,
) -> Split:
    """The split that serves requests fastest; of those within TOLERANCE of it, in batches as large,
    the one with the largest pool, and of these the most even.

    costs: by stage, of the whole model on that stage's device. layer_token_bytes: KV bytes of one
    token on one layer. Raises ConfigError when no split fits.
    """
    problem = _Problem(costs, rooms, layer_token_bytes, load)
    best_s, batch = _fastest(problem)
    limit_s = best_s * (1 + TOLERANCE)
    low = problem.pool_for(batch)
    high = max(low, problem.most_pool_tokens())
    while low < high:
        middle = (low + high + 1) // 2
        if problem.can(batch, middle, limit_s):
            low = middle
        else:
            high = middle - 1
    found = problem.split(_most_even(problem, batch, low, limit_s))
    assert found is not None
    return found


def describe(
    layers: Sequence[int],
    costs: Sequence[ModelCosts],
    rooms: Sequence[StageRoom],
    layer_token_bytes: int,
    load: Load,
) -> Split | None:
    """What is to be expected of this split; None when it does not fit."""
    return _Problem(costs, rooms, layer_token_bytes, load).split(layers)


def _fastest(problem: _Problem) -> tuple[float, int]:
    """Least time per request of any split, and the largest batch with which it is reached. Larger
    batches take less time per request, but need a larger pool, which not every split has."""
    best_s, best_batch = math.inf, 0
    least = problem.load.least_pool_tokens
    for batch in range(_largest_batch(problem), 0, -1):
        better_s = best_s * (1 - _NO_BETTER)
        if not problem.can(batch, least, better_s):
            break  # with any pool, and smaller batches take longer
        pool = problem.pool_for(batch)
        if not problem.can(batch, pool, better_s):
            continue
        stages, layers = range(problem.num_stages), problem.num_layers
        low = 0.0
        high = min(best_s, max(problem.request_s(batch, stage, 0, layers) for stage in stages))
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            low, high = (low, middle) if problem.can(batch, pool, middle) else (middle, high)
        best_s, best_batch = high, batch
    return best_s, best_batch


def _largest_batch(problem: _Problem) -> int:
    """That any split has a pool for. Raises ConfigError when there is none."""
    low, high = 0, problem.load.max_num_seqs
    while low < high:
        middle = (low + high + 1) // 2
        if problem.can(middle, problem.pool_for(middle), math.inf):
            low = middle
        else:
            high = middle - 1
    if low == 0:
        raise ConfigError(_does_not_fit(problem))
    return low


def _does_not_fit(problem: _Problem) -> str:
    stages = problem.num_stages
    weights = problem.weights_bytes(0, 0, problem.num_layers)
    return (
        f"no layer split fits: the weights of {format_size(weights)} and a KV pool of "
        f"{problem.load.least_pool_tokens} tokens on {stages} stage{'s' * (stages > 1)}; use more "
        "GPUs (--pipeline-parallel-size), lower --max-model-len or --kv-cache-memory-bytes, or "
        "raise --gpu-memory-utilization"
    )


def _most_even(problem: _Problem, batch: int, pool_tokens: int, limit_s: float) -> tuple[int, ...]:
    """Of the splits with such a pool and such a time, the one whose stages' times have the least
    sum of squares. Dynamic programme over stages and the layers they end at."""
    stages, layers = problem.num_stages, problem.num_layers
    ends: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for stage in range(stages):
        reached: dict[int, tuple[float, tuple[int, ...]]] = {}
        for first, (squares, split) in ends.items():
            for end in range(first + 1, layers - (stages - 1 - stage) + 1):
                request_s = problem.request_s(batch, stage, first, end)
                if request_s > limit_s or problem.pool_tokens(stage, first, end) < pool_tokens:
                    break
                total = squares + request_s**2
                if end not in reached or total < reached[end][0]:
                    reached[end] = (total, (*split, end - first))
        ends = reached
    return ends[layers][1]
