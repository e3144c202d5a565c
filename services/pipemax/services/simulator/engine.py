"""The virtual clock: events in order of time, and among equals in the order they were scheduled.

Time is whole nanoseconds, so that sums of durations are exact and a run is the same on every
machine.
"""

import heapq
from collections.abc import Callable
from itertools import count
from typing import Any

NS = 1_000_000_000


def to_ns(seconds: float) -> int:
    """Nearest whole number of nanoseconds."""
    return round(seconds * NS)


class EventLoop:
    """Runs what was scheduled, one thing at a time."""

    def __init__(self) -> None:
        self.now_ns = 0
        self.num_events = 0
        """Events run so far."""
        self._heap: list[tuple[int, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = count()

    @property
    def now(self) -> float:
        """Seconds since the start."""
        return self.now_ns / NS

    @property
    def is_idle(self) -> bool:
        """Nothing is scheduled."""
        return not self._heap

    def at(self, when_ns: int, action: Callable[..., None], *arguments: Any) -> None:
        """Schedules a call; a time that has passed means now."""
        when_ns = max(when_ns, self.now_ns)
        heapq.heappush(self._heap, (when_ns, next(self._order), action, arguments))

    def after(self, delay_ns: int, action: Callable[..., None], *arguments: Any) -> None:
        heapq.heappush(self._heap, (self.now_ns + delay_ns, next(self._order), action, arguments))

    def run(self, until_ns: int, done: Callable[[], bool]) -> None:
        """Until `done`, or nothing is left, or the clock would pass `until_ns`, at which it then
        stands still."""
        heap = self._heap
        while heap and not done():
            if heap[0][0] > until_ns:
                self.now_ns = until_ns
                return
            self.now_ns, _, action, arguments = heapq.heappop(heap)
            self.num_events += 1
            action(*arguments)
