"""Streamed requests, from the client's side: every token and character is passed on once, in
order, also when the coordinator was started again meanwhile."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from pipemax.client.completion import Completion
from pipemax.proto.messages.ingest import ChoiceDelta, PositionLogprobs

OnDelta = Callable[[ChoiceDelta], None]
"""Gets what a choice has got since it was called for that choice before. Must not raise."""


@dataclass(slots=True)
class _Passed:
    """Of one choice."""

    token_ids: list[int] = field(default_factory=list)
    """That were passed on."""
    num_chars: int = 0
    seen_tokens: int = 0
    """Since the coordinator started."""
    seen_chars: int = 0


class StreamReader:
    """One request's stream. A coordinator that starts anew runs it again from its first token:
    what was passed on before is compared, and not passed on again."""

    def __init__(self, on_delta: OnDelta) -> None:
        self._on_delta = on_delta
        self._choices: dict[int, _Passed] = {}
        self._differs = False

    def take(self, deltas: Iterable[ChoiceDelta]) -> None:
        for delta in deltas:
            passed = self._choices.setdefault(delta.index, _Passed())
            start, start_chars = passed.seen_tokens, passed.seen_chars
            passed.seen_tokens += len(delta.token_ids)
            passed.seen_chars += len(delta.text)
            self._pass(delta.index, start, delta.token_ids, start_chars, delta.text, delta.logprobs)

    def start_again(self) -> None:
        """The request was submitted to another coordinator."""
        for passed in self._choices.values():
            passed.seen_tokens = passed.seen_chars = 0

    def finish(self, completion: Completion) -> Completion:
        """Passes on what is left of a result. Returns it, or what is to be taken for it."""
        if completion.error is not None:
            return completion
        for index, choice in enumerate(completion.choices):
            self._pass(index, 0, choice.token_ids, 0, choice.text, choice.logprobs)
        if not self._differs:
            return completion
        return Completion.refused(
            completion.request_id,
            completion.index,
            "failed",
            "the system was started again meanwhile and came to other tokens than those that were "
            "passed on before; submit the request again",
        )

    def _pass(
        self,
        index: int,
        start: int,
        token_ids: tuple[int, ...],
        start_chars: int,
        text: str,
        logprobs: tuple[PositionLogprobs, ...] | None,
    ) -> None:
        """`token_ids` stand behind `start` others, and `text` behind `start_chars` characters."""
        passed = self._choices.setdefault(index, _Passed())
        before = passed.token_ids[start : start + len(token_ids)]
        self._differs = self._differs or tuple(before) != token_ids[: len(before)]
        new_ids = token_ids[len(before) :]
        new_text = text[max(0, passed.num_chars - start_chars) :]
        if self._differs or not (new_ids or new_text):
            return
        passed.token_ids += new_ids
        passed.num_chars += len(new_text)
        new_logprobs = None if logprobs is None else logprobs[len(before) :]
        self._on_delta(
            ChoiceDelta(index=index, token_ids=new_ids, text=new_text, logprobs=new_logprobs)
        )
