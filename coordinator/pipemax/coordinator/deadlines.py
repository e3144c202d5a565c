"""Which requests have had the time they were given."""

import heapq

_SLACK = 1024


class Deadlines:
    """Pure: told the time. Costs no more than a few times what is set."""

    def __init__(self) -> None:
        self._at: dict[int, float] = {}
        """By key."""
        self._heap: list[tuple[float, int]] = []
        """Soonest first; some of requests that are done already."""

    def set(self, key: int, at: float) -> None:
        """`at` is on the clock of `over`. Keys are not used twice."""
        self._at[key] = at
        heapq.heappush(self._heap, (at, key))
        if len(self._heap) > 2 * len(self._at) + _SLACK:
            self._heap = [(at, key) for key, at in self._at.items()]
            heapq.heapify(self._heap)

    def discard(self, key: int) -> None:
        """The request is done, or never had a deadline."""
        self._at.pop(key, None)

    def over(self, now: float) -> list[int]:
        """Keys whose time is over, each once."""
        found: list[int] = []
        while self._heap and self._heap[0][0] <= now:
            _, key = heapq.heappop(self._heap)
            if self._at.pop(key, None) is not None:
                found.append(key)
        return found
