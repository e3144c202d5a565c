"""Streaming requests: what one client was told of them, and what it has yet to be told.

Nothing is queued. What a request has produced is kept by the request itself, until its end; all
there is beside it is how far the client was told. A client that does not read therefore costs
nothing more than one that does not stream.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from pipemax.coordinator.events import FinishRequest
from pipemax.coordinator.text.detokenizer import StopChecker
from pipemax.coordinator.text.logprobs import LogprobsTaken
from pipemax.proto.messages.ingest import Choice, ChoiceDelta, Partial, RequestDelta

PARTIALS_AHEAD = 2
"""Sent before the first of them is taken: one is on its way while the other is dealt with."""
MOST_TOKENS = 4096
"""Told of in one message. With 20 logprobs each they take 2 MB; what is left goes with the next."""


@dataclass(slots=True)
class Output:
    """One choice of a request, while it is produced and until the others are."""

    text: StopChecker
    logprobs: LogprobsTaken
    result: FinishRequest | None = None
    told_tokens: int = 0
    told_chars: int = 0
    told_all: bool = False

    @property
    def choice(self) -> Choice:
        """For the client; it has its result."""
        result = self.result
        assert result is not None
        return Choice(
            token_ids=result.output_token_ids,
            text=self._final_text(result),
            finish_reason=result.finish_reason,
            stop_reason=result.stop_reason,
            logprobs=self.logprobs.outputs(),
        )

    def news(self, index: int, most_tokens: int) -> ChoiceDelta | None:
        """What was not told yet, of at most so many tokens; None if there is nothing."""
        if self.told_all:
            return None
        start = self.told_tokens
        if self.result is None:
            token_ids = self.text.token_ids[start : start + most_tokens]
            text = self.text.sure_text(self.told_chars)
        else:
            token_ids = list(self.result.output_token_ids[start : start + most_tokens])
            text = self._final_text(self.result)[self.told_chars :]
        if not token_ids and not text:
            return None
        return ChoiceDelta(
            index=index,
            token_ids=tuple(token_ids),
            text=text,
            logprobs=self.logprobs.outputs(start, start + len(token_ids)),
        )

    def told(self, delta: ChoiceDelta) -> None:
        self.told_tokens += len(delta.token_ids)
        self.told_chars += len(delta.text)
        if self.result is not None:
            self.told_all = self.told_tokens >= len(self.result.output_token_ids)

    def _final_text(self, result: FinishRequest) -> str:
        by_token = result.finish_reason == "stop" and not isinstance(result.stop_reason, str)
        return self.text.text(stopped_by_token=by_token)


class Streaming(Protocol):
    """A request, as far as this module looks at it."""

    @property
    def request_id(self) -> str: ...
    @property
    def choices(self) -> Sequence[Output]: ...


@dataclass(slots=True)
class Stream:
    """Of one client."""

    changed: dict[int, Streaming] = field(default_factory=dict)
    """Requests that got a token since they were told of, by key, the first to wait first."""
    num_sent: int = 0
    num_taken: int = 0

    def taken(self, number: int) -> None:
        self.num_taken = max(self.num_taken, min(number, self.num_sent))

    def next(self) -> Partial | None:
        """What there is to tell now. It counts as told when `sent` was called with it."""
        if not self.changed or self.num_sent - self.num_taken >= PARTIALS_AHEAD:
            return None
        requests = tuple(self._deltas())
        if not requests:  # their tokens are no text yet
            self.changed.clear()
            return None
        return Partial(number=self.num_sent + 1, requests=requests)

    def _deltas(self) -> Iterator[RequestDelta]:
        room = MOST_TOKENS
        for entry in self.changed.values():
            choices = []
            for index, output in enumerate(entry.choices):
                delta = output.news(index, room)
                if delta is not None:
                    choices.append(delta)
                    room -= len(delta.token_ids)
            if choices:
                yield RequestDelta(request_id=entry.request_id, choices=tuple(choices))
            if room <= 0:
                return

    def sent(self, partial: Partial) -> None:
        self.num_sent = partial.number
        deltas = {request.request_id: request for request in partial.requests}
        room = MOST_TOKENS
        for key, entry in list(self.changed.items()):
            if room <= 0:
                return
            if (request := deltas.get(entry.request_id)) is not None:
                for delta in request.choices:
                    entry.choices[delta.index].told(delta)
                    room -= len(delta.token_ids)
            if room > 0:  # else it may have more
                del self.changed[key]
