"""Log probabilities as OpenAI's endpoints and vLLM's extensions of them write them."""

from collections.abc import Iterable, Sequence
from typing import Any, Final

from pipemax.proto.messages.ingest import PositionLogprobs, TokenLogprob

_LEAST: Final = -9999.0
"""JSON has no infinity."""


def chat_logprobs(positions: Sequence[PositionLogprobs], num_top: int) -> dict[str, Any]:
    """`choices[].logprobs` of a chat completion."""
    return {
        "content": [
            {
                **_chat_token(position[0]),
                "top_logprobs": [_chat_token(token) for token in position[1 : num_top + 1]],
            }
            for position in positions
        ]
    }


def completion_logprobs(
    positions: Sequence[PositionLogprobs], num_top: int, start: int = 0
) -> dict[str, Any]:
    """`choices[].logprobs` of a completion. The likeliest tokens of a position are keyed by their
    text, and the token itself is always among them. `start`: characters of tokens before."""
    offsets: list[int] = []
    end = start
    for own, *_ in positions:
        offsets.append(end)
        end += len(own.text)
    return {
        "tokens": [position[0].text for position in positions],
        "token_logprobs": [_number(position[0]) for position in positions],
        "top_logprobs": [_by_text(position, num_top) for position in positions],
        "text_offset": offsets,
    }


def prompt_logprobs(positions: Sequence[PositionLogprobs]) -> list[dict[str, Any] | None]:
    """vLLM's `prompt_logprobs`: by token id."""
    return [_by_id(position) for position in positions]


def _chat_token(token: TokenLogprob) -> dict[str, Any]:
    return {
        "token": token.text,
        "logprob": _number(token),
        "bytes": list(token.text.encode("utf-8", errors="replace")),
    }


def _by_text(position: PositionLogprobs, num_top: int) -> dict[str, float | None] | None:
    own, *likeliest = position
    if own.logprob is None:
        return None
    return {token.text: _number(token) for token in _last_first([*likeliest[:num_top], own])}


def _by_id(position: PositionLogprobs) -> dict[str, Any] | None:
    own, *likeliest = position
    if own.logprob is None:
        return None
    return {
        str(token.token_id): {
            "logprob": _number(token),
            "rank": token.rank,
            "decoded_token": token.text,
        }
        for token in [own, *likeliest]
    }


def _last_first(tokens: Iterable[TokenLogprob]) -> list[TokenLogprob]:
    """So that of tokens with one text, the likelier stays in a dict."""
    return sorted(tokens, key=lambda token: token.rank, reverse=True)


def _number(token: TokenLogprob) -> float | None:
    return None if token.logprob is None else max(token.logprob, _LEAST)
