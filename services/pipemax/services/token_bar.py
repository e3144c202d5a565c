"""A batch's progress bar."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text


class TokenBar:
    """A progress bar in tokens on standard error; nothing when that is no terminal.

    The total is not known before the end: it is taken to be the requests' number times the mean
    tokens of those that finished, and so is the time remaining.
    """

    def __init__(self, console: Console | None = None) -> None:
        console = console or Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.fields[requests]}/{task.fields[num_requests]} requests"),
            BarColumn(),
            TextColumn("{task.completed:,.0f} tokens"),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            _TimeLeft(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(
            "", total=None, requests=0, num_requests=0, rate="", ends_at=None
        )
        self._requests = self._num_requests = self._tokens = 0
        self._started_at = time.monotonic()

    def __enter__(self) -> "TokenBar":
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def start(self, num_requests: int | None) -> None:
        """None: nobody knows how many there will be."""
        self._num_requests = num_requests or 0
        self._started_at = time.monotonic()
        self._bar.update(self._task, num_requests=self._num_requests or "?")

    def finished(self, num_tokens: int) -> None:
        self._requests += 1
        self._tokens += num_tokens
        requests_per_finished = max(1.0, self._num_requests / self._requests)
        elapsed_s = time.monotonic() - self._started_at
        self._bar.update(
            self._task,
            completed=self._tokens,
            total=self._tokens * requests_per_finished if self._num_requests else None,
            requests=self._requests,
            rate=f"{self._tokens / max(elapsed_s, 1e-9):,.0f} tokens/s",
            ends_at=self._started_at + elapsed_s * requests_per_finished
            if self._num_requests
            else None,
        )


class _TimeLeft(ProgressColumn):
    """Until `ends_at`. Rich's own column measures speed anew whenever the total changes, which
    here is at every request: it would never know."""

    def render(self, task: Task) -> Text:
        ends_at = task.fields["ends_at"]
        if ends_at is None:
            return Text("-:--:-- left")
        minutes, seconds = divmod(max(0, round(ends_at - time.monotonic())), 60)
        hours, minutes = divmod(minutes, 60)
        return Text(f"{hours}:{minutes:02d}:{seconds:02d} left")
