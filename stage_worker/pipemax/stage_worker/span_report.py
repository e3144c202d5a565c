"""A stage's spans as messages, for as long as somebody watches."""

import os
import time
from collections.abc import Callable

from pipemax.proto.messages.spans import StageSpans, pack_i64
from pipemax.proto.states import STATES
from pipemax.stage_worker.span_recorder import SpanRecorder
from pipemax.stage_worker.state_clock import StateClock


class SpanReport:
    """Gives the clock a recorder when it is asked to, and takes it away again."""

    def __init__(
        self, stage: int, clock: StateClock, now_s: Callable[[], float] = time.monotonic
    ) -> None:
        self._stage = stage
        self._clock = clock
        self._now_s = now_s
        self._until_s = 0.0

    def record(self, seconds: float) -> None:
        """From now on, for so long."""
        self._until_s = self._now_s() + seconds
        if self._clock.recorder is None:
            begin_ns, _ = self._clock.cut()
            self._clock.recorder = SpanRecorder(begin_ns)

    def take(self) -> StageSpans | None:
        """What was spent since the last call; None while nobody watches."""
        recorder = self._clock.recorder
        if recorder is None:
            return None
        _, total_ns = self._clock.cut()
        begin_ns, states, lengths_ns, steps = recorder.take()
        if self._now_s() >= self._until_s:
            self._clock.recorder = None
        return StageSpans(
            stage=self._stage,
            pid=os.getpid(),
            begin_ns=begin_ns,
            states=states,
            lengths_ns=pack_i64(lengths_ns),
            steps=pack_i64(steps),
            total_ns=tuple(total_ns[state] for state in STATES),
        )
