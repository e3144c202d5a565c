"""The host pool's pages are made to be there in the background, part by part."""

import os
import threading
from collections.abc import Callable
from queue import SimpleQueue

from pipemax.kv_daemon.host_pool import HostPool

Cpus = frozenset[int] | None


class PoolPages:
    """Touches parts of the pool, in the order in which they are asked for, in a thread.

    parts: [begin, end) of each, in bytes.
    wake_fd: an eventfd, written whenever a part is there.
    finish: called for each part that was touched, in the thread; what it raises, `is_there` does.
    """

    def __init__(
        self,
        pool: HostPool,
        parts: tuple[tuple[int, int], ...],
        wake_fd: int,
        finish: Callable[[int, int], None] | None = None,
    ) -> None:
        self._pool = pool
        self._parts = parts
        self._wake_fd = wake_fd
        self._finish = finish
        self._asked: set[int] = set()
        self._there: set[int] = set()
        self._error: Exception | None = None
        self._queue: SimpleQueue[tuple[int, Cpus] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="pages", daemon=True)
        self._thread.start()

    def touch(self, part: int, cpus: Cpus = None) -> None:
        """Asks for a part, on the memory node of `cpus` if given; again changes nothing."""
        if part not in self._asked:
            self._asked.add(part)
            self._queue.put((part, cpus))

    def is_there(self, part: int) -> bool:
        """Raises what went wrong with any part."""
        if self._error is not None:
            raise self._error
        return part in self._there

    @property
    def all_there(self) -> bool:
        return all(self.is_there(part) for part in range(len(self._parts)))

    def close(self) -> None:
        """Before the pool's."""
        self._pool.stop_touching()
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (asked := self._queue.get()) is not None:
            part, cpus = asked
            begin, end = self._parts[part]
            try:
                if not self._pool.touch(begin, end, cpus):
                    return
                if self._finish is not None:
                    self._finish(begin, end)
            except Exception as error:  # raised where somebody can act on it
                self._error = error
            self._there.add(part)
            os.eventfd_write(self._wake_fd, 1)
