"""Waiting for messages: first awake, for a moment, then asleep."""

import math
import os
import time
from collections.abc import Callable
from typing import Any, Protocol


class Poller(Protocol):
    """zmq.Poller, as far as it is needed here."""

    def poll(self, timeout: int) -> list[tuple[Any, int]]:
        """What can be read, at the latest after so many milliseconds."""


class SpinThenBlock:
    """A process that sleeps is woken some tens of microseconds after its message has come, more on
    a virtual machine whose idle cores are taken from it; one that keeps looking is not late.

    Looking costs the core, so it is bounded, and between two looks other processes on the same core
    have their turn. Where there are none to spare it is best left out: the process that spins takes
    time from the one it waits for.
    """

    def __init__(
        self,
        poller: Poller,
        spin_s: float,
        now_s: Callable[[], float] = time.monotonic,
        give_way: Callable[[], None] = os.sched_yield,
    ) -> None:
        """`spin_s`: how long to stay awake; 0 never does."""
        self._poller = poller
        self._spin_s = spin_s
        self._now_s = now_s
        self._give_way = give_way

    def poll(self, timeout_s: float) -> list[tuple[Any, int]]:
        """What can be read, at the latest after `timeout_s`; 0 only looks."""
        begin_s = self._now_s()
        spin_until_s = begin_s + min(self._spin_s, timeout_s)
        while self._now_s() < spin_until_s:
            if found := self._poller.poll(0):
                return found
            self._give_way()
        left_s = max(0.0, begin_s + timeout_s - self._now_s()) if timeout_s > 0 else 0.0
        return self._poller.poll(math.ceil(left_s * 1e3))
