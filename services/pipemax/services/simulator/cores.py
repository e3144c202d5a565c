"""Stages that compute on the same cores: the more of them at a time, the slower each is."""

from collections.abc import Callable, Sequence
from typing import Any

from pipemax.services.simulator.engine import EventLoop


class SharedCores:
    """With k stages at work, each takes `slowdown[k - 1]` times as long as alone. A step that has
    begun slows down and speeds up as others come and go."""

    def __init__(self, loop: EventLoop, slowdown: Sequence[float]) -> None:
        self._loop = loop
        self._slowdown = tuple(slowdown)
        self._work: dict[int, tuple[float, Callable[..., None], tuple[Any, ...]]] = {}
        """By order of arrival: nanoseconds of work left, alone, and what to call at the end."""
        self._arrivals = 0
        self._since_ns = 0
        self._turn = 0
        """Changes with every arrival and departure; a wake-up of an earlier turn is void."""

    def after(self, work_ns: int, then: Callable[..., None], *arguments: Any) -> None:
        """Calls `then` when `work_ns` of work are done."""
        self._progress()
        self._work[self._arrivals] = (float(work_ns), then, arguments)
        self._arrivals += 1
        self._schedule()

    def _factor(self) -> float:
        return self._slowdown[min(len(self._work), len(self._slowdown)) - 1]

    def _progress(self) -> None:
        """Takes off what was done since the last change."""
        elapsed_ns = self._loop.now_ns - self._since_ns
        self._since_ns = self._loop.now_ns
        if self._work and elapsed_ns:
            done_ns = elapsed_ns / self._factor()
            for key, (left_ns, then, arguments) in self._work.items():
                self._work[key] = (left_ns - done_ns, then, arguments)

    def _schedule(self) -> None:
        self._turn += 1
        if self._work:
            first = min(self._work, key=lambda key: self._work[key][0])
            delay_ns = round(max(0.0, self._work[first][0]) * self._factor())
            self._loop.after(delay_ns, self._end, first, self._turn)

    def _end(self, key: int, turn: int) -> None:
        if turn != self._turn:
            return
        self._progress()
        _, then, arguments = self._work.pop(key)
        self._schedule()
        then(*arguments)
