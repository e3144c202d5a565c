"""The last seconds of spans, for the built-in page. Written by the coordinator's loop, read by the
thread that serves HTTP."""

import time
from collections import deque
from collections.abc import Callable

from pipemax.proto.messages.spans import CopySpans, StageSpans

WANTED_S = 3.0
"""So long after it was last looked at, spans are still recorded."""
WINDOW_S = 12.0
MOST_BYTES = 8 * 2**20
"""Of columns. With very short steps the window is shorter."""

Numbered = tuple[int, StageSpans]


class LiveSpans:
    """Empty, and nobody records, unless somebody looks."""

    def __init__(self, now_s: Callable[[], float] = time.monotonic) -> None:
        self._now_s = now_s
        self._wanted_until_s = float("-inf")
        self._kept: deque[tuple[float, int, Numbered]] = deque()
        """(when it came, bytes, report)."""
        self._bytes = 0
        self._next_number = 1
        self._shown: tuple[Numbered, ...] = ()
        """Replaced, never changed: another thread reads it."""

    @property
    def is_wanted(self) -> bool:
        return self._now_s() < self._wanted_until_s

    def keep(self, report: StageSpans | CopySpans) -> None:
        if isinstance(report, CopySpans):
            return  # the page shows stages
        now_s, size = self._now_s(), 17 * len(report.states)
        if self.is_wanted:
            self._kept.append((now_s, size, (self._next_number, report)))
            self._bytes += size
            self._next_number += 1
        while self._kept and (
            not self.is_wanted or self._bytes > MOST_BYTES or self._kept[0][0] < now_s - WINDOW_S
        ):
            self._bytes -= self._kept.popleft()[1]
        self._shown = tuple(numbered for _, _, numbered in self._kept)

    def after(self, number: int) -> tuple[Numbered, ...]:
        """What has come since the report of this number, oldest first. To ask is to want more."""
        self._wanted_until_s = self._now_s() + WANTED_S
        return tuple(numbered for numbered in self._shown if numbered[0] > number)
