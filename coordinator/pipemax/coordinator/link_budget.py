"""How many blocks the link can bring before the step that a prefetch is for.

A sliding window, on each stage over the steps that it has yet to compute before that one:

    budget = min over stages s of  η · BW_s · Σ_{k ∈ W_s} T_s(k) / block_bytes_s − queued_s

BW_s is the host-to-device bandwidth measured while the other links are busy, less one standard
deviation of what was measured (a link whose speed varies is late with what its mean could carry),
T_s(k) the time predicted for step k, and η leaves room for jitter. queued_s are the blocks ordered
for steps of the window which the stage still waits for: all but those of the first, which it
computes already, or for which its link works now.

What a prefetch leaves of its budget is carried over, up to one request's worth, so that a request
larger than one step's budget gets its turn as well (deficit round robin).
"""

import math
from collections.abc import Sequence

LINK_EFFICIENCY = 0.9
"""η: share of the measured bandwidth that is planned with."""
_SMOOTHING = 0.2
"""Weight of the newest measurement in the running means."""
_LEAST_OF_MEAN = 0.25
"""However much the bandwidth varies, this share of its mean is planned with."""
UNLIMITED = 2**31


class LinkBudget:
    """Blocks per prefetch. Unlimited until both a bandwidth and a step time are known."""

    def __init__(self, block_bytes: Sequence[int]) -> None:
        """`block_bytes`: bytes of one block on each stage."""
        self._block_bytes = tuple(block_bytes)
        self._links = [_Bandwidth() for _ in block_bytes]
        self._rates: list[tuple[int, float]] = []
        """Stages whose link was measured, each with the blocks per second planned with."""
        self._step_s: list[float | None] = [None] * len(block_bytes)
        self._computed = [-1] * len(block_bytes)
        """Newest step each stage has computed."""
        self._planned: dict[int, tuple[float | None, ...]] = {}
        """Predicted seconds by stage, of steps that some stage has yet to compute."""
        self._ordered: dict[int, int] = {}
        """Blocks to load for a step."""
        self._granted = 0.0
        """The window of the prefetch for the next step, once it was asked for."""
        self._carry = 0.0

    def step_planned(self, step: int, seconds: Sequence[float | None]) -> None:
        """`step` went to the stages; `seconds` it is predicted to take on each, None where nothing
        is known."""
        self._planned[step] = tuple(seconds)
        self._carry = max(0.0, self._carry + self._granted - self._ordered.get(step, 0))
        self._granted = 0.0

    def prefetch_ordered(self, step: int, blocks: int) -> None:
        """`blocks` are to be loaded for `step`, which is not planned yet."""
        self._ordered[step] = blocks

    def step_measured(self, stage: int, step: int, compute_s: float) -> None:
        """`stage` has computed `step`."""
        self._step_s[stage] = _smooth(self._step_s[stage], compute_s)
        if step <= self._computed[stage]:
            return
        self._computed[stage] = step
        everywhere = min(self._computed)
        for known in (self._planned, self._ordered):
            for done in [k for k in known if k <= everywhere]:
                del known[done]

    def link_measured(self, stage: int, load_bytes: int, load_seconds: float) -> None:
        if load_bytes > 0 and load_seconds > 0:
            self._links[stage].measured(load_bytes / load_seconds)
            self._rates = [
                (stage, LINK_EFFICIENCY * link.dependable / size)
                for stage, (link, size) in enumerate(
                    zip(self._links, self._block_bytes, strict=True)
                )
                if link.mean is not None
            ]

    @property
    def bandwidths_bytes_s(self) -> list[float]:
        """What each stage's link is trusted to carry; 0 before it was measured."""
        return [link.dependable for link in self._links]

    @property
    def blocks_per_s(self) -> float | None:
        """What the slowest link carries; None before one was measured."""
        return min([rate for _, rate in self._rates], default=None)

    @property
    def per_step(self) -> float:
        """Blocks the slowest link carries in a step time of late."""
        per_stage = [
            rate * step_s
            for stage, rate in self._rates
            if (step_s := self._step_s[stage]) is not None
        ]
        return min(per_stage, default=float(UNLIMITED))

    @property
    def window(self) -> float:
        """Blocks that all links can bring, beside what is queued, before the step after those
        planned."""
        windows = [self._window_of(stage, rate) for stage, rate in self._rates]
        return max(0.0, min(windows, default=float(UNLIMITED)))

    def grant(self, largest_blocks: int) -> int:
        """Blocks a prefetch may bring now. `largest_blocks` is the largest candidate: what is
        carried over from steps that prefetched less never exceeds it."""
        self._granted = self.window
        self._carry = min(self._carry, float(largest_blocks))
        return int(min(self._granted + self._carry, max(self._granted, float(largest_blocks))))

    def _window_of(self, stage: int, rate: float) -> float:
        computed, usual = self._computed[stage], self._step_s[stage]
        seconds = 0.0
        for step, predicted in self._planned.items():
            if step > computed:
                time_s = predicted[stage] if predicted[stage] is not None else usual
                if time_s is None:
                    return float(UNLIMITED)
                seconds += time_s
        if not seconds and usual is not None:
            seconds = usual
        queued = sum([blocks for step, blocks in self._ordered.items() if step > computed + 1])
        return rate * seconds - queued


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
