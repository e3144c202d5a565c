"""A stream: one thread that runs what was queued, in order."""

import random
import threading
import time
import traceback
from collections.abc import Callable
from queue import SimpleQueue

from support.fake_cuda.events import Abandoned

Operation = Callable[[], None]


class FakeStream:
    def __init__(
        self,
        number: int,
        gpu: int,
        late: Callable[[], float],
        fail: Callable[[str], None],
        is_gone: Callable[[], bool],
    ) -> None:
        """late: seconds to sleep before the next operation. fail: takes what one raised. is_gone:
        the process is no more, and nothing runs any more."""
        self.number = number
        self.gpu = gpu
        self._late = late
        self._fail = fail
        self._is_gone = is_gone
        self._queue: SimpleQueue[Operation | None] = SimpleQueue()
        self._thread = threading.Thread(
            target=self._run, name=f"fake-cuda-stream-{number}", daemon=True
        )
        self._thread.start()

    def add(self, operation: Operation) -> None:
        self._queue.put(operation)

    def end(self) -> None:
        """After what is queued."""
        self._queue.put(None)

    def join(self, timeout_s: float) -> None:
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def _run(self) -> None:
        while (operation := self._queue.get()) is not None:
            late_s = self._late()
            if late_s:
                time.sleep(late_s)
            if self._is_gone():
                return
            try:
                operation()
            except Abandoned:
                return
            except Exception:
                self._fail(traceback.format_exc())
                return
            del operation  # a waiting thread keeps nothing alive


def lateness(seed: str, longest_s: float, share: float) -> Callable[[], float]:
    """Draws how late each operation of one stream is."""
    if not longest_s:
        return lambda: 0.0
    draw = random.Random(seed)
    return lambda: draw.uniform(0.0, longest_s) if draw.random() < share else 0.0
