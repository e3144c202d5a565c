"""When the cyclic garbage collector may run: not in the middle of a step.

A full collection looks at every object there is: a quarter of a second with a hundred thousand
requests waiting, which a pipeline of steps of 50 ms would stand still for. Next to nothing here is
freed by it, as requests are in no cycles: they go when nobody refers to them. So the collector goes
through young objects by itself, in fractions of a millisecond, and through all of them when nothing
runs, or when it has not for so long that the pause no longer counts.
"""

import gc
from collections.abc import Callable

_YOUNG, _OLDER, _NEVER = 10_000, 50, 2**30
"""Thresholds of the three generations, see `gc.set_threshold`: objects, then collections."""
IDLE_INTERVAL_S = 30.0
"""Between full collections while nothing runs."""
BUSY_INTERVAL_S = 900.0
"""… and while something does: 0.3 seconds of them are 0.03 % of the time."""


class Garbage:
    """Call `tick` often. `collect` is a full collection."""

    def __init__(self, now: float, collect: Callable[[], object] = gc.collect) -> None:
        self._collect = collect
        self._collected_at = now
        self._was_busy = False

    @staticmethod
    def take_over() -> None:
        """Everything there is now stays; from now on full collections are `tick`'s alone."""
        gc.collect()
        gc.freeze()
        gc.set_threshold(_YOUNG, _OLDER, _NEVER)

    def tick(self, now: float, *, is_busy: bool) -> None:
        """`now`: any monotonic clock, in seconds."""
        self._was_busy = self._was_busy or is_busy
        due_after_s = BUSY_INTERVAL_S if is_busy else IDLE_INTERVAL_S
        if not self._was_busy or now - self._collected_at < due_after_s:
            return
        self._collect()
        self._collected_at = now
        self._was_busy = is_busy
