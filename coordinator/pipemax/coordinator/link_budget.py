"""How many blocks the link can bring while the steps before a prefetch's target compute.

`budget = η · BW_s · T_s / block_bytes_s`, the smallest over stages, where BW_s is the
host-to-device bandwidth measured while the other links are busy, less one standard deviation of
what was measured (a link whose speed varies is late with what its mean could carry), T_s the recent
step time of the stage, and η leaves room for jitter.
What a step does not use is carried over, up to one request's worth, so that a request larger than
one step's budget gets its turn as well (deficit round robin).
"""

import math
from collections.abc import Iterator, Sequence

LINK_EFFICIENCY = 0.9
"""η: share of the measured bandwidth that is planned with."""
_SMOOTHING = 0.2
"""Weight of the newest measurement in the running means."""
_LEAST_OF_MEAN = 0.25
"""However much the bandwidth varies, this share of its mean is planned with."""
UNLIMITED = 2**31


class LinkBudget:
    """Blocks per step. Unlimited until both a bandwidth and a step time were measured."""

    def __init__(self, block_bytes: Sequence[int]) -> None:
        """`block_bytes`: bytes of one block on each stage."""
        self._block_bytes = tuple(block_bytes)
        self._links = [_Bandwidth() for _ in block_bytes]
        self._step_s: list[float | None] = [None] * len(block_bytes)
        self._credit = float(UNLIMITED)

    def step_measured(self, stage: int, compute_s: float) -> None:
        self._step_s[stage] = _smooth(self._step_s[stage], compute_s)

    def link_measured(self, stage: int, load_bytes: int, load_seconds: float) -> None:
        if load_bytes > 0 and load_seconds > 0:
            self._links[stage].measured(load_bytes / load_seconds)

    @property
    def blocks_per_s(self) -> float | None:
        """What the slowest link carries; None before one was measured."""
        return min((rate for _, rate in self._rates()), default=None)

    @property
    def per_step(self) -> float:
        """Blocks the slowest link carries in one step time."""
        per_stage = [
            rate * step_s
            for stage, rate in self._rates()
            if (step_s := self._step_s[stage]) is not None
        ]
        return min(per_stage, default=float(UNLIMITED))

    def advance(self) -> None:
        """One more step was planned: the link gains a step time."""
        self._credit += self.per_step

    def grant(self, largest_blocks: int) -> int:
        """Blocks a prefetch may bring now. `largest_blocks` is the largest candidate: what is
        carried over from steps that prefetched less never exceeds it."""
        self._credit = min(self._credit, max(self.per_step, float(largest_blocks)))
        return int(self._credit)

    def spend(self, blocks: int) -> None:
        self._credit = max(0.0, self._credit - blocks)

    def _rates(self) -> Iterator[tuple[int, float]]:
        """Stages whose link was measured, each with the blocks per second planned with."""
        for stage, (link, size) in enumerate(zip(self._links, self._block_bytes, strict=True)):
            if link.mean is not None:
                yield stage, LINK_EFFICIENCY * link.dependable / size


class _Bandwidth:
    """Running mean and variance of a link's measured rate, bytes per second."""

    def __init__(self) -> None:
        self.mean: float | None = None
        self._variance = 0.0

    def measured(self, rate: float) -> None:
        if self.mean is not None:
            off = rate - self.mean
            self._variance = (1 - _SMOOTHING) * (self._variance + _SMOOTHING * off * off)
        self.mean = _smooth(self.mean, rate)

    @property
    def dependable(self) -> float:
        """The mean less one standard deviation; 0 before the first measurement."""
        mean = self.mean or 0.0
        return max(_LEAST_OF_MEAN * mean, mean - math.sqrt(self._variance))


def _smooth(mean: float | None, value: float) -> float:
    return value if mean is None else mean + _SMOOTHING * (value - mean)
