"""Where a stage's time goes: every moment belongs to exactly one state."""

from collections.abc import Callable
from typing import Final, Literal, get_args

State = Literal["compute", "wait_plan", "wait_activation", "wait_kv", "prepare", "send"]
STATES: Final[tuple[State, ...]] = get_args(State)


class StateClock:
    """Splits the time since its construction over the states.

    There is always a current state and time is only ever added to it, so the states sum to the
    wall time by construction. Time is kept in whole nanoseconds: sums are exact.
    """

    def __init__(self, now_ns: Callable[[], int], state: State = "wait_plan") -> None:
        """`now_ns` must never go backwards (`time.monotonic_ns`)."""
        self._now_ns = now_ns
        self._since_ns = now_ns()
        self._spent_ns: dict[State, int] = dict.fromkeys(STATES, 0)
        self.state: State = state

    def switch(self, state: State) -> float:
        """From now on time belongs to `state`; returns how many seconds the one left behind had
        lasted since the last switch."""
        now_ns = self._now_ns()
        lasted_ns = now_ns - self._since_ns
        self._spent_ns[self.state] += lasted_ns
        self._since_ns = now_ns
        self.state = state
        return lasted_ns / 1e9

    def seconds(self) -> dict[str, float]:
        """Seconds by state, up to this moment."""
        running_ns = self._now_ns() - self._since_ns
        return {
            state: (spent_ns + (running_ns if state == self.state else 0)) / 1e9
            for state, spent_ns in self._spent_ns.items()
        }
