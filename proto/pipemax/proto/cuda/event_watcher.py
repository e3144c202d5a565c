"""Learning that a GPU has passed an event without anybody polling for it."""

import os
import threading
from collections import deque
from queue import SimpleQueue
from typing import Generic, TypeVar

from pipemax.proto.cuda.runtime import CudaEvent, CudaRuntime

JOIN_S = 0.5
"""A thread that waits for a GPU which does not answer is left behind after this time."""

Token = TypeVar("Token")


class EventWatcher(Generic[Token]):
    """A thread that waits for events, in the order in which they were given to it.

    wake_fd: an eventfd, written whenever `passed` has news. Its owner reads it; watchers may share
        one.
    """

    def __init__(self, runtime: CudaRuntime, name: str, wake_fd: int) -> None:
        self._runtime = runtime
        self._wake_fd = wake_fd
        self._queue: SimpleQueue[tuple[CudaEvent, Token] | None] = SimpleQueue()
        self._passed: deque[Token] = deque()
        self._error: Exception | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def watch(self, event: CudaEvent, token: Token) -> None:
        """Once `event` has passed, `passed` returns `token`. It must not be recorded again
        before."""
        self._queue.put((event, token))

    def passed(self) -> list[Token]:
        """What passed since the last call, in order. Raises what CUDA raised."""
        passed = []
        while self._passed:
            passed.append(self._passed.popleft())
        if self._error is not None and not passed:
            raise self._error
        return passed

    def close(self) -> None:
        """Safe to call twice. Destroys nothing; does not wait for what has not passed."""
        self._closing = True
        self._queue.put(None)
        self._thread.join(JOIN_S)

    def _run(self) -> None:
        while (given := self._queue.get()) is not None:
            event, token = given
            try:
                self._runtime.synchronize_event(event)
            except Exception as error:  # raised where somebody can act on it
                self._error = error
            if self._closing:
                return
            if self._error is None:
                self._passed.append(token)
            os.eventfd_write(self._wake_fd, 1)
            if self._error is not None:
                return
