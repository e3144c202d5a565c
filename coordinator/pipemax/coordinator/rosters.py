"""Running requests by what they can do next, kept up to date move by move.

Planning looks at everybody who could take part in a step; with thousands of requests it must not
find out from each of them anew.
"""

from collections.abc import Iterable
from operator import attrgetter

import numpy as np

from pipemax.coordinator.candidates import Candidate, CandidatePool, Candidates
from pipemax.coordinator.request import NO_STEP, NOT_RESIDENT, Request
from pipemax.proto.errors import InvariantError

_KEY, _TURN, _PLANNED = attrgetter("key"), attrgetter("last_turn"), attrgetter("planned")


class Rosters:
    """Call `place` after every change to a request's `num_missing`, `staged_for`, `in_flight` or
    `remaining`, and `remove` when it stops running. Decodes that nothing else happens to are placed
    many at a time, by `depart` and `come_back`."""

    def __init__(self) -> None:
        self.on_host = CandidatePool()
        """Idle, and lack device blocks."""
        self.resident: dict[int, Request] = {}
        """Idle, on the device, and one token short of the next sample."""
        self.prefilling: dict[int, Request] = {}
        """On the device, and more than one token short; may have steps in flight."""
        self.staged: dict[int, Request] = {}
        """Being prefetched for a step that is not planned yet."""
        self.resident_context = 0
        """Context tokens of those in `resident`, together."""
        self.prefill_left = 0
        """Tokens that those in `prefilling` are short, together."""
        self.missing_blocks = 0
        """Blocks that those in `on_host` lack, together."""
        self.version = 0
        """Grows with every change to `on_host`."""
        self._missing: dict[int, int] = {}
        """Blocks by key, of those in `on_host`."""
        self._incomplete: set[int] = set()

    @property
    def num_incomplete(self) -> int:
        """Requests that lack device blocks, steps in flight or not."""
        return len(self._incomplete)

    def place(self, request: Request) -> None:
        """Put the request where it belongs now. Who stays in a roster keeps its place there."""
        key = request.key
        on_host = False
        context, prefill = NOT_RESIDENT, 0
        staged = request.staged_for != NO_STEP
        if request.num_missing:
            self._incomplete.add(key)
            on_host = not staged and not request.in_flight
        else:
            self._incomplete.discard(key)
            if not staged:
                remaining = len(request.tokens) - request.planned
                if remaining > 1:
                    prefill = remaining
                elif remaining == 1 and not request.in_flight:
                    context = request.planned
        if on_host or key in self._missing:
            self._place_on_host(request, on_host)
        self._count(request, context, prefill)
        if staged:
            self.staged[key] = request
        else:
            self.staged.pop(key, None)

    def depart(self, requests: Iterable[Request], context_tokens: int) -> None:
        """These residents, of so many context tokens together, are in a step now."""
        resident = self.resident
        for request in requests:
            del resident[request.key]
            request.placed_context = NOT_RESIDENT
        self.resident_context -= context_tokens

    def come_back(self, requests: Iterable[Request]) -> None:
        """The decodes of these have come back: `place` of each, for who was in no roster."""
        resident, context_tokens = self.resident, 0
        for request in requests:
            if request.num_missing:
                self.place(request)
                continue
            resident[request.key] = request
            request.placed_context = request.planned
            context_tokens += request.planned
        self.resident_context += context_tokens

    def start_over(self, requests: Iterable[Request]) -> None:
        """Place these requests, which other rosters had counted."""
        for request in requests:
            request.placed_context, request.placed_prefill = NOT_RESIDENT, 0
            self.place(request)

    def remove(self, request: Request) -> None:
        key = request.key
        self._incomplete.discard(key)
        self._place_on_host(request, belongs=False)
        self._count(request, NOT_RESIDENT, 0)
        self.staged.pop(key, None)

    def residents(self) -> Candidates:
        """Of `resident`, as columns."""
        return residents_of(self.resident.values())

    def check(self, running: dict[int, Request]) -> None:
        """Raises InvariantError unless the rosters are those that looking at everybody gives."""
        idle = [r for r in running.values() if r.staged_for == NO_STEP]
        whole = [r for r in idle if not r.num_missing]
        on_host = {r.key: r for r in idle if r.num_missing and not r.in_flight}
        resident = {r.key: r for r in whole if r.remaining == 1 and not r.in_flight}
        prefilling = {r.key: r for r in whole if r.remaining > 1}
        fresh: dict[str, object] = {
            "on_host": {r.key: candidate_of(r) for r in on_host.values()},
            "resident": resident,
            "prefilling": prefilling,
            "staged": {r.key: r for r in running.values() if r.staged_for != NO_STEP},
            "_incomplete": {r.key for r in running.values() if r.num_missing},
            "_missing": {key: r.num_missing for key, r in on_host.items()},
            "missing_blocks": sum(r.num_missing for r in on_host.values()),
            "resident_context": sum(r.planned for r in resident.values()),
            "prefill_left": sum(r.remaining for r in prefilling.values()),
        }
        kept = {**vars(self), "on_host": {c.key: c for c in self.on_host.columns()}}
        for name, value in fresh.items():
            if kept[name] != value:
                raise InvariantError(f"the rosters' {name} is out of date")

    def _count(self, request: Request, context_tokens: int, prefill_tokens: int) -> None:
        """As resident, NOT_RESIDENT for not, and as prefilling, 0 for not."""
        key = request.key
        if context_tokens != request.placed_context:
            self.resident_context += max(0, context_tokens) - max(0, request.placed_context)
            request.placed_context = context_tokens
            if context_tokens >= 0:
                self.resident[key] = request
            else:
                self.resident.pop(key, None)
        if prefill_tokens != request.placed_prefill:
            self.prefill_left += prefill_tokens - request.placed_prefill
            request.placed_prefill = prefill_tokens
            if prefill_tokens:
                self.prefilling[key] = request
            else:
                self.prefilling.pop(key, None)

    def _place_on_host(self, request: Request, belongs: bool) -> None:
        key = request.key
        before = self._missing.pop(key, 0)
        if not before and not belongs:
            return
        self.version += 1
        self.missing_blocks -= before
        if belongs:
            self.on_host.put(candidate_of(request))
            self._missing[key] = request.num_missing
            self.missing_blocks += request.num_missing
        else:
            self.on_host.discard(key)


def candidate_of(request: Request) -> Candidate:
    return Candidate(request.key, request.last_turn, request.num_missing, request.planned)


def residents_of(requests: Iterable[Request]) -> Candidates:
    """Of device-resident requests, as columns."""
    those = list(requests)
    count = len(those)
    return Candidates(
        np.fromiter(map(_KEY, those), np.int64, count),
        np.fromiter(map(_TURN, those), np.int64, count),
        np.zeros(count, np.int64),
        np.fromiter(map(_PLANNED, those), np.int64, count),
    )
