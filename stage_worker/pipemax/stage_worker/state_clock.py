"""Where a stage's time goes: every moment belongs to exactly one state."""

from collections import deque
from collections.abc import Callable, Iterable

from pipemax.proto.states import STATES, State
from pipemax.stage_worker.span_recorder import SpanRecorder


class StateClock:
    """Splits the time since its construction over the states.

    There is always a current state and time is only ever added to it, so the states sum to the
    wall time by construction. Time is kept in whole nanoseconds: sums are exact.

    While a device has steps of its own under way (from `take_off` until `settle` says that it
    landed), what it does counts, not what this process does meanwhile. It tells only afterwards,
    step by step. Until then that time is in no state; once landed, all of it is.
    """

    def __init__(self, now_ns: Callable[[], int], state: State = "wait_plan") -> None:
        """`now_ns` must never go backwards (`time.monotonic_ns`)."""
        self._now_ns = now_ns
        self._since_ns = now_ns()
        """Up to here every moment has its state."""
        self._spent_ns: dict[State, int] = dict.fromkeys(STATES, 0)
        self._told_ns: deque[tuple[State, int]] = deque()
        """What the device did, as far as it is longer than the time that has passed here."""
        self.in_flight = False
        self.state: State = state
        self.step = -1
        """What time is spent on, for whoever records it."""
        self.recorder: SpanRecorder | None = None
        """Is told of every moment from when it is set on; see `cut`."""

    def switch(self, state: State) -> float:
        """From now on time belongs to `state`, or does so once the device has landed; returns how
        many seconds the one left behind had lasted since the last switch, 0 in flight."""
        if self.in_flight:
            self.state = state
            return 0.0
        lasted_ns = self._now_ns() - self._since_ns
        self._spend(self.state, lasted_ns)
        self.state = state
        return lasted_ns / 1e9

    def cut(self) -> tuple[int, dict[State, int]]:
        """Accounts for the time up to now, or in flight up to where the device has told. Returns
        that moment and the nanoseconds spent on each state until then."""
        self.switch(self.state)
        return self._since_ns, dict(self._spent_ns)

    def take_off(self) -> None:
        """From now on time is the device's. In flight already, nothing changes."""
        self.switch(self.state)
        self.in_flight = True

    def settle(self, told: Iterable[tuple[State, float]], *, landed: bool) -> None:
        """The device has ended a step and tells how many seconds since take-off, or since the step
        before, went to what, in order. `landed`: it has no other. What has passed here beyond what
        it told was spent on learning of it, and on telling others: `send`.

        Its clock is not ours: what it tells never reaches further than the present.
        """
        self._told_ns.extend((state, round(seconds * 1e9)) for state, seconds in told)
        left_ns = self._now_ns() - self._since_ns
        while self._told_ns and left_ns > 0:
            state, told_ns = self._told_ns.popleft()
            spent_ns = max(0, min(told_ns, left_ns))
            self._spend(state, spent_ns)
            left_ns -= spent_ns
            if told_ns > spent_ns:
                self._told_ns.appendleft((state, told_ns - spent_ns))
        if landed:
            self._told_ns.clear()
            self._spend("send", left_ns)
            self.in_flight = False

    def _spend(self, state: State, spent_ns: int) -> None:
        if self.recorder is not None:
            self.recorder.add(state, self.step, spent_ns)
        self._spent_ns[state] += spent_ns
        self._since_ns += spent_ns

    def seconds(self) -> dict[str, float]:
        """Seconds by state, up to this moment; in flight, up to where the device has told."""
        running_ns = 0 if self.in_flight else self._now_ns() - self._since_ns
        return {
            state: (spent_ns + (running_ns if state == self.state else 0)) / 1e9
            for state, spent_ns in self._spent_ns.items()
        }
