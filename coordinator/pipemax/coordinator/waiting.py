"""Requests that wait to run: a hundred thousand of them may.

One that has never run is kept as little more than its prompt, four bytes a token; a Request, which
has room for all that a running one needs, is made of it when its turn has come.
"""

from array import array
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from pipemax.coordinator.request import Request
from pipemax.proto.messages.ingest import SamplingParams

_SLACK = 1024


@dataclass(slots=True, eq=False)
class Newcomer:
    """A request that has never run: what a Request is made of."""

    key: int
    prompt: "array[int]"
    """Of typecode "i". Not changed: choices of one request have it in common."""
    sampling: SamplingParams
    seed: int
    arrived_at: float
    job: int = 0
    bad_words: tuple[tuple[int, ...], ...] = ()
    grammar: str = ""


class WaitingQueue:
    """By key, in order of service. Iterating gives the keys, in that order."""

    def __init__(self, max_model_len: int, eos_token_ids: frozenset[int]) -> None:
        """Both: what the model adds to the ends that a request itself has."""
        self._max_model_len = max_model_len
        self._eos_token_ids = eos_token_ids
        self._waiting: dict[int, Newcomer | Request] = {}
        self._order: deque[int] = deque()
        """Keys; also some of requests that were taken out of the middle, for good."""

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, key: object) -> bool:
        return key in self._waiting

    def __iter__(self) -> Iterator[int]:
        return filter(self._waiting.__contains__, self._order)

    def put_last(self, newcomer: Newcomer) -> None:
        self._waiting[newcomer.key] = newcomer
        self._order.append(newcomer.key)

    def put_first(self, request: Request) -> None:
        """Ahead of all others: it ran before."""
        self._waiting[request.key] = request
        self._order.appendleft(request.key)

    def first(self) -> Request | None:
        """Whose turn is next; stays in the queue."""
        if not self._waiting:
            return None
        key = self._order[0]
        first = self._waiting[key]
        if isinstance(first, Newcomer):
            first = self._waiting[key] = self._request_of(first)
        return first

    def remove(self, key: int) -> Request | None:
        """Takes it out, wherever it is; None if it does not wait. One that was not the first must
        not come back."""
        found = self._waiting.pop(key, None)
        order = self._order
        if len(order) > 2 * len(self._waiting) + _SLACK:
            order = self._order = deque(self)
        while order and order[0] not in self._waiting:
            order.popleft()
        return self._request_of(found) if isinstance(found, Newcomer) else found

    def never_ran(self) -> Iterator[int]:
        """Keys of those that were never admitted."""
        return (
            key
            for key, waiting in self._waiting.items()
            if isinstance(waiting, Newcomer) or waiting.admitted_at is None
        )

    def ran_before(self) -> list[Request]:
        """Those that were admitted once."""
        return [
            waiting
            for waiting in self._waiting.values()
            if isinstance(waiting, Request) and waiting.admitted_at is not None
        ]

    def lengths(self) -> Iterator[int]:
        """Tokens that each has to compute before its next one, in order."""
        for key in self:
            waiting = self._waiting[key]
            yield len(waiting.prompt if isinstance(waiting, Newcomer) else waiting.tokens)

    def _request_of(self, newcomer: Newcomer) -> Request:
        request = Request(
            newcomer.key,
            newcomer.prompt,
            newcomer.sampling,
            newcomer.seed,
            newcomer.arrived_at,
            newcomer.job,
            newcomer.bad_words,
            newcomer.grammar,
        )
        request.limit_to(self._max_model_len, self._eos_token_ids)
        return request
