"""What a batch came to, and how it gets on."""

from dataclasses import dataclass
from typing import Protocol


class BatchProgress(Protocol):
    """Is told how a batch gets on."""

    def start(self, num_requests: int | None) -> None:
        """So many requests are to be done; None: as many as come through a pipe."""
        ...

    def finished(self, num_tokens: int) -> None:
        """One request is done; `num_tokens` is its prompt and output, 0 if it was not served."""
        ...


class Quiet:
    """BatchProgress that tells nobody."""

    def start(self, num_requests: int | None) -> None:
        pass

    def finished(self, num_tokens: int) -> None:
        pass


@dataclass(slots=True, kw_only=True)
class BatchReport:
    """What a run of a batch came to."""

    completed: int = 0
    failed: int = 0
    """Lines answered by an error line."""
    skipped: int = 0
    """Lines that had their result, or their error line, from an earlier run."""
    prompt_tokens: int = 0
    """Of completed requests."""
    output_tokens: int = 0
    seconds: float = 0.0
    first_error: str | None = None
    """Of the first line that was answered by an error line."""

    @property
    def requests(self) -> int:
        """Answered in this run."""
        return self.completed + self.failed

    @property
    def throughput(self) -> str:
        """One line, in the form users of vLLM know."""
        seconds = max(self.seconds, 1e-9)
        total = self.prompt_tokens + self.output_tokens
        return (
            f"Throughput: {self.completed / seconds:.2f} requests/s, "
            f"{total / seconds:.2f} total tokens/s, "
            f"{self.output_tokens / seconds:.2f} output tokens/s"
        )
