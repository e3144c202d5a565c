"""When modelled steps begin and end."""

import time
from collections.abc import Callable

from pipemax.stage_worker.state_clock import StateClock


class Pace:
    """Makes steps take as long as they should, one after the other, by deadline.

    What this process spends on a step beside waiting (messages, checks, waking up late) is no
    part of the modelled GPU: a step that waited for nothing begins when the one before it ended,
    and one that waited for rows only begins when they arrived, both by the model. So lateness does
    not add up, neither from step to step nor from stage to stage. A process that is slower than the
    model, though, stays so: a step ends no earlier than it was seen to.
    """

    def __init__(
        self,
        clock: StateClock,
        now_s: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`clock` says how long the stage waited, and for what."""
        self._clock = clock
        self._now_s = now_s
        self._sleep = sleep
        self._ended_s = now_s()
        self._idle_s, self._starved_s = self._waited()

    def begin(self, arrived_s: float | None) -> float:
        """When the step about to run begins. `arrived_s`: when its rows did; None on stage 0."""
        idle_s, starved_s = self._waited()
        begin_s = self._ended_s
        if idle_s > self._idle_s:
            begin_s += idle_s - self._idle_s + starved_s - self._starved_s
        return begin_s if arrived_s is None else max(begin_s, arrived_s)

    def wait_until(self, moment_s: float) -> None:
        """Returns at `moment_s`, or at once when it has passed."""
        while (left_s := moment_s - self._now_s()) > 0:
            self._sleep(left_s)

    def end(self, deadline_s: float) -> float:
        """Returns when the step's time is over: its end by the model, later than `deadline_s` only
        if that has passed already."""
        self._ended_s = max(deadline_s, self._now_s())
        self.wait_until(deadline_s)
        self._idle_s, self._starved_s = self._waited()
        return self._ended_s

    def _waited(self) -> tuple[float, float]:
        """Seconds the stage waited for plans or KV, and for rows."""
        seconds = self._clock.seconds()
        return seconds["wait_plan"] + seconds["wait_kv"], seconds["wait_activation"]
