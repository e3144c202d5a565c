"""Events behind steps, by number: what copies wait for, and how a reset knows that all is over."""

import time

from pipemax.proto.cuda.runtime import CudaEvent, CudaRuntime, Stream
from pipemax.proto.errors import PipemaxSystemError, WireError

RING = 64
"""Events of a kind. Number n is recorded on the event at n modulo this."""
DRAIN_S = 20.0
"""Longest that steps queued before a reset may take to end: more means that they wait for a process
that is gone, and that only a fresh stage goes on."""


class StepRing:
    """The ring of events behind steps, and whether those before a reset have ended."""

    def __init__(self, runtime: CudaRuntime, *, interprocess: bool) -> None:
        self._runtime = runtime
        self.events = tuple(runtime.create_event(interprocess=interprocess) for _ in range(RING))
        self.newest = -1
        self._drain_by_s: float | None = None

    def record(self, stream: Stream) -> int:
        self.newest += 1
        self._runtime.record(self.events[self.newest % RING], stream)
        return self.newest

    def wait(self, stream: Stream, number: int) -> None:
        """`stream` waits for that step; one too old for the ring was passed long ago."""
        if number > self.newest:
            raise WireError("unexpected", f"a copy behind step event {number} of {self.newest + 1}")
        if number >= max(0, self.newest - RING + 1):
            self._runtime.wait(stream, self.events[number % RING])

    @property
    def latest(self) -> CudaEvent | None:
        return self.events[self.newest % RING] if self.newest >= 0 else None

    def begin_drain(self) -> None:
        self._drain_by_s = time.monotonic() + DRAIN_S

    @property
    def drained(self) -> bool:
        """Everything recorded has ended. Raises PipemaxSystemError when it does not in time."""
        if self._drain_by_s is None:
            return True
        if self.latest is None or self._runtime.finished(self.latest):
            self._drain_by_s = None
            return True
        if time.monotonic() > self._drain_by_s:
            raise PipemaxSystemError(
                f"steps that were queued before a reset have not ended after {DRAIN_S:.0f} s: "
                "they wait for what a process that is gone was to bring"
            )
        return False

    def close(self) -> None:
        for event in self.events:
            self._runtime.destroy_event(event)
