"""How long a stage takes for a step, learned from what stages report.

    T = c(rows) · (δ + α·b + π·P) + β·L + γ·A

b decoding requests, L their context tokens, P prompt tokens, A the token pairs that prompt chunks
attend over; rows = b + P is how tall the matrix products are. The first bracket is work that reads
the weights: its cost climbs in steps of 128 rows, so a table c corrects it by rows, piecewise
linear within a tile and free to jump at its edge. The form is the paper's `T = α·b + β·L + δ` with
terms for prefill and the table added.

δ, α, π, β, γ come from recursive least squares with forgetting in information form: the weighted
sums of past steps fade, those of the warm-up sweep stay with a small weight. The matrix to invert
is therefore never singular, however alike the steps of a long decode phase are, and what such steps
say nothing about stays as the sweep had it. Errors are relative, so a long prefill step counts as
much as a short decode step.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipemax.coordinator.tile_table import TileTable
from pipemax.proto.messages.control import SweepSample

_FORGETTING = 0.97
"""What one further step leaves of the weight of those before it: about 33 steps are remembered."""
_PRIOR_STEPS = 2.0
"""Weight of the whole warm-up sweep, in steps; it does not fade."""
_RIDGE = 1e-6
"""Of the mean diagonal: keeps the system solvable before there is a sweep."""
_FIT_ROUNDS = 8
_OUTLIER = 0.1
"""A relative error beyond this pulls no harder than one of this size: something else ran too."""
_SETTLED_STEPS = 8
"""Steps before errors are taken for outliers, and before not every step is solved for."""
_SOLVE_EVERY = 4
"""Steps from one solution to the next: they differ little, and solving is most of the work."""
_SCALES = (1.0, 64.0, 256.0, 2.0**14, 2.0**18)
"""Usual sizes of 1, b, P, L and A: keeps the numbers solved for alike in size."""
_N = len(_SCALES)
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
_LEAST_SCALE = 1e-6


@dataclass(frozen=True, slots=True)
class StepFeatures:
    """What a step's time depends on."""

    decode_requests: int
    """b: requests that compute one token."""
    context_tokens: int
    """L: tokens whose KV they read."""
    prefill_tokens: int = 0
    """P: prompt tokens computed."""
    prefill_pairs: int = 0
    """A: over all prompt tokens computed, the tokens each attends to."""

    @property
    def rows(self) -> int:
        return self.decode_requests + self.prefill_tokens


@dataclass(frozen=True, slots=True)
class LinearCost:
    """A decode step's time near some working point: `fixed_s + per_request_s·b + per_token_s·L`."""

    fixed_s: float
    per_request_s: float
    per_token_s: float

    def time_s(self, requests: float, context_tokens: float) -> float:
        return self.fixed_s + self.per_request_s * requests + self.per_token_s * context_tokens

    def times_s(self, requests: Ints, context_tokens: Ints) -> Floats:
        """The same of many: exactly what `time_s` gives of each."""
        times_s: Floats = (
            self.fixed_s + self.per_request_s * requests + self.per_token_s * context_tokens
        )
        return times_s

    def share_s(self, requests: float, context_tokens: float) -> float:
        """What these requests add to a step."""
        return self.per_request_s * requests + self.per_token_s * context_tokens


class StageCost:
    """One stage's model. Predicts nothing until it was fitted or has observed a step."""

    def __init__(self, forgetting: float = _FORGETTING) -> None:
        self._forgetting = forgetting
        self._table = TileTable()
        self._theta: list[float] | None = None
        self._prior = _Sums()
        self._recent = _Sums()
        self._swept: tuple[list[float], TileTable] | None = None
        self._observed = 0
        self.relative_error: float | None = None
        """|predicted − measured| / measured of the last observed step, predicted before it was
        learned from; None before there was a prediction."""

    @property
    def is_fitted(self) -> bool:
        """It has something to predict from."""
        return self._theta is not None

    def fit(self, samples: Sequence[tuple[StepFeatures, float]]) -> None:
        """Start over from a warm-up sweep: pairs of features and seconds, each more than 0.

        The sweep should hold the first and last row of every tile that decode will use.
        """
        if not samples or any(seconds <= 0 for _, seconds in samples):
            raise ValueError("a sweep needs samples, each of more than 0 seconds")
        self._table = TileTable()
        self._recent = _Sums()
        self._observed = 0
        for _ in range(_FIT_ROUNDS):
            self._prior = _Sums()
            for features, seconds in samples:
                self._prior.add(self._inputs(features), seconds, _PRIOR_STEPS / len(samples))
            self._solve()
            for features, seconds in samples:
                self._learn_factor(features, self._inputs(features), seconds)
        assert self._theta is not None
        self._swept = (list(self._theta), deepcopy(self._table))

    def predict_anywhere(self, features: StepFeatures) -> float | None:
        """Seconds, by the warm-up sweep alone where there was one. What was learned since is better
        near the steps of late, but may be off at sizes that have not been run for long."""
        if self._swept is None:
            return self.predict(features)
        theta, table = self._swept
        return _dot(theta, _inputs(features, table))

    def predict(self, features: StepFeatures) -> float | None:
        """Seconds; None before anything is known."""
        if self._theta is None:
            return None
        return _dot(self._theta, _inputs(features, self._table))

    def observe(self, features: StepFeatures, seconds: float) -> float | None:
        """Learn from a step that took `seconds`; returns `relative_error`. Steps of no measurable
        time are ignored."""
        if seconds <= 0:
            return self.relative_error
        inputs = self._inputs(features)
        weight = 1.0
        if self._theta is not None:
            predicted = _dot(self._theta, inputs)
            self.relative_error = abs(predicted - seconds) / seconds
            if self._observed >= _SETTLED_STEPS and self.relative_error > _OUTLIER:
                weight = _OUTLIER / self.relative_error
        self._observed += 1
        self._recent.fade(self._forgetting)
        self._recent.add(inputs, seconds, weight)
        if self._observed <= _SETTLED_STEPS or self._observed % _SOLVE_EVERY == 0:
            self._solve()
        self._learn_factor(features, inputs, seconds, weight)
        return self.relative_error

    def linear(self, near: StepFeatures) -> LinearCost | None:
        """The model as a decode step of about `near` sees it; None before anything is known."""
        predicted = self.predict(near)
        if predicted is None or self._theta is None:
            return None
        per_request = self._table.factor(near.rows) * self._theta[1] / _SCALES[1]
        per_token = self._theta[3] / _SCALES[3]
        variable = per_request * near.decode_requests + per_token * near.context_tokens
        return LinearCost(max(0.0, predicted - variable), per_request, per_token)

    def _inputs(self, features: StepFeatures) -> list[float]:
        return _inputs(features, self._table)

    def _learn_factor(
        self, features: StepFeatures, inputs: Sequence[float], seconds: float, weight: float = 1.0
    ) -> None:
        assert self._theta is not None
        theta = self._theta
        weights_part = theta[0] * inputs[0] + theta[1] * inputs[1] + theta[2] * inputs[2]
        attention = theta[3] * inputs[3] + theta[4] * inputs[4]
        if weights_part <= 0:
            return
        observed = inputs[0] * (seconds - attention) / weights_part
        share = weights_part / (weights_part + attention)
        self._table.learn(features.rows, observed, share * weight)

    def _solve(self) -> None:
        """No coefficient is negative: one that would be is left out and the others solved again."""
        free = list(range(_N))
        matrix, right = self._prior.plus(self._recent)
        ridge = _RIDGE * sum([matrix[i][i] for i in free]) / _N
        for i in free:
            matrix[i][i] += ridge
        theta = [0.0] * _N
        while free:
            if len(free) == _N:
                values = solve_symmetric(matrix, right)
            else:
                rows = [[matrix[i][j] for j in free if j <= i] for i in free]
                values = solve_symmetric(rows, [right[i] for i in free])
            worst = min(range(len(free)), key=values.__getitem__)
            if values[worst] >= 0:
                for i, value in zip(free, values, strict=True):
                    theta[i] = value
                break
            del free[worst]
        self._theta = theta


def _inputs(features: StepFeatures, table: TileTable) -> list[float]:
    _, scale_b, scale_p, scale_l, scale_a = _SCALES
    c = table.factor(features.decode_requests + features.prefill_tokens)
    return [
        c,
        c * features.decode_requests / scale_b,
        c * features.prefill_tokens / scale_p,
        features.context_tokens / scale_l,
        features.prefill_pairs / scale_a,
    ]


class PipelineCost:
    """All stages' models; the slowest stage sets the pace."""

    def __init__(self, num_stages: int) -> None:
        self.stages = [StageCost() for _ in range(num_stages)]

    def warm_up(self, sweeps: Sequence[Sequence[SweepSample]]) -> None:
        """Fit the stages that know nothing yet to what their warm-up sweeps measured. A stage that
        was started again sweeps again, but what its steps have taught is better."""
        for model, sweep in zip(self.stages, sweeps, strict=False):
            if sweep and not model.is_fitted:
                model.fit([(_features_of(sample), sample.compute_s) for sample in sweep])

    def observe(self, stage: int, features: StepFeatures, seconds: float) -> float | None:
        """See StageCost.observe."""
        return self.stages[stage].observe(features, seconds)

    def take_error(self, stage: int) -> float | None:
        """The relative error of the stage's last observed step, once: None until the next one."""
        model = self.stages[stage]
        error, model.relative_error = model.relative_error, None
        return error

    def predict(self, features: StepFeatures) -> list[float | None]:
        """Seconds by stage; None where nothing is known."""
        return [stage.predict(features) for stage in self.stages]

    def slowest(self, near: StepFeatures) -> StageCost | None:
        """The stage that is slowest for `near`; None until every stage has a model."""
        times = [stage.predict(near) for stage in self.stages]
        known = [time for time in times if time is not None]
        if not times or len(known) < len(times):
            return None
        return self.stages[known.index(max(known))]

    def linear(self, near: StepFeatures) -> LinearCost | None:
        """Of the stage that is slowest for `near`; None until every stage has a model."""
        slowest = self.slowest(near)
        return slowest.linear(near) if slowest else None


def _features_of(sample: SweepSample) -> StepFeatures:
    return StepFeatures(
        sample.decode_requests, sample.context_tokens, sample.prefill_tokens, sample.prefill_pairs
    )


class _Sums:
    """Weighted normal equations of relative errors: Σ w·x·xᵀ/y² and Σ w·x/y."""

    def __init__(self) -> None:
        self._matrix = [[0.0] * (i + 1) for i in range(_N)]
        """The lower triangle; the rest is its mirror image."""
        self._right = [0.0] * _N
        self._scale = 1.0
        """Of both, so far."""

    def add(self, inputs: Sequence[float], seconds: float, weight: float) -> None:
        scaled = [value / seconds for value in inputs]
        weight /= self._scale
        right = self._right
        for i, row in enumerate(self._matrix):
            factor = weight * scaled[i]
            if factor:
                for j in range(i + 1):
                    row[j] += factor * scaled[j]
                right[i] += factor

    def fade(self, factor: float) -> None:
        """What was added so far counts less from now on; new sums count as they are. Kept as one
        scale: a step then touches only what it adds to."""
        self._scale *= factor
        if self._scale < _LEAST_SCALE:
            self._matrix = [[value * self._scale for value in row] for row in self._matrix]
            self._right = [value * self._scale for value in self._right]
            self._scale = 1.0

    def plus(self, other: "_Sums") -> tuple[list[list[float]], list[float]]:
        """The sum of both: the lower triangle, row by row, and the right-hand side."""
        mine, theirs = self._scale, other._scale
        matrix = [
            [mine * a + theirs * b for a, b in zip(row, their_row, strict=True)]
            for row, their_row in zip(self._matrix, other._matrix, strict=True)
        ]
        right = [mine * a + theirs * b for a, b in zip(self._right, other._right, strict=True)]
        return matrix, right


def solve_symmetric(matrix: Sequence[Sequence[float]], right: Sequence[float]) -> list[float]:
    """Solves `matrix · x = right` for a positive definite matrix, by its Cholesky factor. Only the
    lower triangle is read. A direction without any information gets 0.

    Plain loops: every stage's every other step is solved for, and sums over generators took
    several times as long."""
    size = len(right)
    floor = 1e-12 * max((matrix[i][i] for i in range(size)), default=0.0)
    lower: list[list[float]] = []
    solved: list[float] = []
    for i in range(size):
        given = matrix[i]
        row: list[float] = []
        for j in range(i):
            other = lower[j]
            total = 0.0
            for k in range(j):
                total += row[k] * other[k]
            row.append((given[j] - total) / other[j])
        squares = along = 0.0
        for k in range(i):
            squares += row[k] * row[k]
            along += row[k] * solved[k]
        rest = given[i] - squares
        row.append(rest**0.5 if rest > floor else float("inf"))
        lower.append(row)
        solved.append((right[i] - along) / row[i])
    for i in range(size - 1, -1, -1):
        total = 0.0
        for k in range(i + 1, size):
            total += lower[k][i] * solved[k]
        solved[i] = (solved[i] - total) / lower[i][i]
    return solved


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    a0, a1, a2, a3, a4 = a
    b0, b1, b2, b3, b4 = b
    return a0 * b0 + a1 * b1 + a2 * b2 + a3 * b3 + a4 * b4
