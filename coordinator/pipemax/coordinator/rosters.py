"""Running requests by what they can do next, kept up to date move by move.

Planning looks at everybody who could take part in a step; with thousands of requests it must not
find out from each of them anew.
"""

from pipemax.coordinator.policy import Candidate
from pipemax.coordinator.request import NO_STEP, Request
from pipemax.proto.errors import InvariantError


class Rosters:
    """Call `place` after every change to a request's `num_missing`, `staged_for`, `in_flight` or
    `remaining`, and `remove` when it stops running."""

    def __init__(self) -> None:
        self.on_host: dict[int, Candidate] = {}
        """Idle, and lack device blocks."""
        self.resident: dict[int, Candidate] = {}
        """Idle, on the device, and one token short of the next sample."""
        self.prefilling: dict[int, Request] = {}
        """On the device, and more than one token short; may have steps in flight."""
        self.staged: dict[int, Request] = {}
        """Being prefetched for a step that is not planned yet."""
        self.resident_context = 0
        """Context tokens of those in `resident`, together."""
        self.missing_blocks = 0
        """Blocks that those in `on_host` lack, together."""
        self.version = 0
        """Grows with every change to `on_host`."""
        self._incomplete: set[int] = set()

    @property
    def num_incomplete(self) -> int:
        """Requests that lack device blocks, steps in flight or not."""
        return len(self._incomplete)

    def place(self, request: Request) -> None:
        """Put the request where it belongs now. Who stays in a roster keeps its place there."""
        # Several calls per item of every step: no properties, no helper where nothing changes.
        key = request.key
        on_host = resident = prefilling = False
        staged = request.staged_for != NO_STEP
        if request.num_missing:
            self._incomplete.add(key)
            on_host = not staged and not request.in_flight
        else:
            self._incomplete.discard(key)
            if not staged:
                remaining = len(request.tokens) - request.planned
                prefilling = remaining > 1
                resident = remaining == 1 and not request.in_flight
        if on_host or key in self.on_host:
            self._place_on_host(request, on_host)
        before = self.resident.get(key)
        if before is not None:
            self.resident_context -= before.context_tokens
        if resident:
            self.resident[key] = candidate_of(request)
            self.resident_context += request.planned
        elif before is not None:
            del self.resident[key]
        if prefilling:
            self.prefilling[key] = request
        else:
            self.prefilling.pop(key, None)
        if staged:
            self.staged[key] = request
        else:
            self.staged.pop(key, None)

    def remove(self, request: Request) -> None:
        key = request.key
        self._incomplete.discard(key)
        self._place_on_host(request, belongs=False)
        before = self.resident.pop(key, None)
        if before is not None:
            self.resident_context -= before.context_tokens
        self.prefilling.pop(key, None)
        self.staged.pop(key, None)

    def check(self, running: dict[int, Request]) -> None:
        """Raises InvariantError unless the rosters are those a fresh start would give."""
        fresh = Rosters()
        for request in running.values():
            fresh.place(request)
        for name in ("on_host", "resident", "prefilling", "staged", "_incomplete"):
            if getattr(fresh, name) != getattr(self, name):
                raise InvariantError(f"the roster {name} is out of date")
        if fresh.missing_blocks != self.missing_blocks:
            raise InvariantError("blocks on the host are miscounted")
        if fresh.resident_context != self.resident_context:
            raise InvariantError("context tokens on the device are miscounted")

    def _place_on_host(self, request: Request, belongs: bool) -> None:
        before = self.on_host.get(request.key)
        if before is None and not belongs:
            return
        self.version += 1
        self.missing_blocks -= before.load_blocks if before else 0
        if belongs:
            self.on_host[request.key] = candidate_of(request)
            self.missing_blocks += request.num_missing
        else:
            del self.on_host[request.key]


def candidate_of(request: Request) -> Candidate:
    return _new_candidate(
        Candidate, (request.key, request.last_turn, request.num_missing, request.planned)
    )


_new_candidate = tuple.__new__
"""A few per request of every step: the constructor of a named tuple is Python and takes longer."""
