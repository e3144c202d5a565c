"""Who has not been heard of for too long. Pure: no sockets, no clock."""

from collections.abc import Iterator

OWN_GAP_SHARE = 0.25
"""Of the allowed silence: if this process itself did not look for so long, it was stopped or the
machine slept, and nobody can be blamed for what was not heard."""


class Liveness:
    """Processes that beat from their work loops, and when each was last heard."""

    def __init__(self, most_silent_s: float) -> None:
        self._most_silent_s = most_silent_s
        self._heard_at: dict[str, float] = {}
        self._looked_at: float | None = None

    def heard(self, process: str, now: float) -> None:
        """It said something. From the first time on it is expected to go on doing so."""
        self._heard_at[process] = now

    def forget(self, process: str) -> None:
        """It has ended or begins anew; nothing is expected until it is heard again."""
        self._heard_at.pop(process, None)

    def silent(self, now: float) -> Iterator[tuple[str, float]]:
        """Processes silent for too long and for how many seconds, each once: they are forgotten.
        To be called often."""
        gap = 0.0 if self._looked_at is None else now - self._looked_at
        self._looked_at = now
        if gap > OWN_GAP_SHARE * self._most_silent_s:
            self._heard_at = dict.fromkeys(self._heard_at, now)
            return
        for process, heard_at in list(self._heard_at.items()):
            if now - heard_at > self._most_silent_s:
                del self._heard_at[process]
                yield process, now - heard_at
