"""An imitated link: how long a copy takes on it."""

CATCH_UP_S = 0.005
"""A copy that starts this soon after the last one ended is taken to follow it without a gap."""


class LinkPacer:
    """Times of one direction of a link of `bytes_per_s`; None: copies take as long as they take.

    Copies are paced by deadline. One that follows another closely is counted from the other's
    deadline, not from when a thread woke up and started it, so that lateness does not add up and
    the long-run rate is the one asked for.
    """

    def __init__(self, bytes_per_s: float | None) -> None:
        self._bytes_per_s = bytes_per_s
        self._free_at = float("-inf")
        self.busy_s = 0.0
        """Time with a copy under way."""

    def begin(self, now: float, num_bytes: int) -> tuple[float, float]:
        """(begin, deadline) of a copy started at `now`."""
        if self._bytes_per_s is None:
            return now, now
        begin = self._free_at if now - self._free_at <= CATCH_UP_S else now
        return begin, begin + num_bytes / self._bytes_per_s

    def end(self, begin: float, deadline: float, copied_at: float) -> None:
        """The bytes were there at `copied_at`; on the link the copy ends at its deadline, or when
        it really ended if the memory was slower than the link."""
        self._free_at = max(deadline, copied_at)
        self.busy_s += self._free_at - begin
