"""Log probabilities of one request, gathered while it runs, and put into words at its end."""

from pipemax.coordinator.text.processor import TextProcessor
from pipemax.proto.errors import InvariantError
from pipemax.proto.messages.control import RowLogprobs
from pipemax.proto.messages.ingest import PositionLogprobs, SamplingParams, TokenLogprob
from pipemax.proto.messages.types import unpack_f32, unpack_i32


class LogprobsTaken:
    """As the last stage sent them, four bytes a number: most requests wait long for their end."""

    __slots__ = ("_first_token", "_outputs", "_prompt", "_text")

    def __init__(self, text: TextProcessor, sampling: SamplingParams, first_token: int) -> None:
        """`first_token` of the prompt has no probability."""
        self._text = text
        self._first_token = first_token
        self._outputs: list[RowLogprobs] | None = None if sampling.logprobs is None else []
        self._prompt: list[RowLogprobs] | None = None if sampling.prompt_logprobs is None else []

    def take(self, row: RowLogprobs | None) -> None:
        """Of the next output token. Raises InvariantError when they are wanted and not there."""
        if self._outputs is not None:
            self._outputs.append(_there(row))

    def take_prompt(self, row: RowLogprobs | None) -> None:
        """Of the next prompt token, from the second on. Raises as `take`."""
        if self._prompt is not None:
            self._prompt.append(_there(row))

    def outputs(
        self, start: int = 0, end: int | None = None
    ) -> tuple[PositionLogprobs, ...] | None:
        """Of the output tokens from `start` to `end`."""
        if self._outputs is None:
            return None
        return tuple(map(self._position, self._outputs[start:end]))

    def prompt(self) -> tuple[PositionLogprobs, ...] | None:
        if self._prompt is None:
            return None
        first = TokenLogprob(self._first_token, self._text.token_text(self._first_token), None, 0)
        return ((first,), *map(self._position, self._prompt))

    def _position(self, row: RowLogprobs) -> PositionLogprobs:
        token_ids, logprobs = unpack_i32(row.token_ids), unpack_f32(row.logprobs)
        pairs = zip(token_ids, logprobs, strict=True)
        return tuple(
            TokenLogprob(token_id, self._text.token_text(token_id), logprob, rank or row.rank)
            for rank, (token_id, logprob) in enumerate(pairs)
        )


def _there(row: RowLogprobs | None) -> RowLogprobs:
    if row is None:
        raise InvariantError("a step came back without the logprobs that were asked for")
    return row
