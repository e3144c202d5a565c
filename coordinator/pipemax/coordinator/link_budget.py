"""How many blocks the link can bring while the steps before a prefetch's target compute.

`budget = η · BW_s · T_s / block_bytes_s`, the smallest over stages, where BW_s is the measured
host-to-device bandwidth, T_s the recent step time of the stage, and η leaves room for jitter.
What a step does not use is carried over, up to one request's worth, so that a request larger than
one step's budget gets its turn as well (deficit round robin).
"""

from collections.abc import Sequence

LINK_EFFICIENCY = 0.9
"""η: share of the measured bandwidth that is planned with."""
_SMOOTHING = 0.2
"""Weight of the newest measurement in the running means."""
UNLIMITED = 2**31


class LinkBudget:
    """Blocks per step. Unlimited until both a bandwidth and a step time were measured."""

    def __init__(self, block_bytes: Sequence[int]) -> None:
        """`block_bytes`: bytes of one block on each stage."""
        self._block_bytes = tuple(block_bytes)
        self._bytes_per_s: list[float | None] = [None] * len(block_bytes)
        self._step_s: list[float | None] = [None] * len(block_bytes)
        self._credit = float(UNLIMITED)

    def step_measured(self, stage: int, compute_s: float) -> None:
        self._step_s[stage] = _smooth(self._step_s[stage], compute_s)

    def link_measured(self, stage: int, load_bytes: int, load_seconds: float) -> None:
        if load_bytes > 0 and load_seconds > 0:
            rate = load_bytes / load_seconds
            self._bytes_per_s[stage] = _smooth(self._bytes_per_s[stage], rate)

    @property
    def per_step(self) -> float:
        """Blocks the slowest link carries in one step time."""
        per_stage = [
            LINK_EFFICIENCY * rate * step_s / size
            for rate, step_s, size in zip(
                self._bytes_per_s, self._step_s, self._block_bytes, strict=True
            )
            if rate is not None and step_s is not None
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


def _smooth(mean: float | None, value: float) -> float:
    return value if mean is None else mean + _SMOOTHING * (value - mean)
