"""Rings of events by which processes wait for each other's streams: see `messages/kv.py`."""

from collections.abc import Sequence
from typing import Final

from pipemax.proto.cuda.runtime import CudaEvent, CudaRuntime, Stream

RING_EVENTS: Final = 64
"""Many times what one process has queued: at most four steps."""


class EventRing:
    """Ours: recorded here, waited for elsewhere."""

    def __init__(self, runtime: CudaRuntime) -> None:
        self._runtime = runtime
        self._events = [runtime.create_event(interprocess=True) for _ in range(RING_EVENTS)]
        self.handles = tuple(runtime.export_event(event) for event in self._events)
        self._last = -1

    def record(self, stream: Stream) -> int:
        """Behind everything on `stream`; returns the running number."""
        self._last += 1
        self._runtime.record(self._events[self._last % len(self._events)], stream)
        return self._last

    def close(self) -> None:
        for event in self._events:
            self._runtime.destroy_event(event)


class PeerEvents:
    """Another process's EventRing."""

    def __init__(self, runtime: CudaRuntime, handles: Sequence[bytes]) -> None:
        """Raises PipemaxSystemError when that process is gone."""
        self._runtime = runtime
        self._events: list[CudaEvent] = []
        self._newest = -1
        try:
            for handle in handles:
                self._events.append(runtime.open_event(handle))
        except BaseException:
            self.close()
            raise

    def wait(self, stream: Stream, number: int) -> None:
        """What is queued on `stream` from now on runs after record `number`, which its process has
        announced. One that has fallen out of the ring was passed long ago."""
        self._newest = max(self._newest, number)
        if number > self._newest - len(self._events):
            self._runtime.wait(stream, self._events[number % len(self._events)])

    def close(self) -> None:
        for event in self._events:
            self._runtime.destroy_event(event)
