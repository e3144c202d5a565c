"""Streams as OpenAI's clients read them: what a request produces, to server-sent events."""

from collections.abc import Iterator
from typing import Any

import msgspec

from pipemax.client import ChoiceDelta, Completion
from pipemax.services.batch.openai_logprobs import chat_logprobs, completion_logprobs
from pipemax.services.batch.openai_results import (
    CHAT_URL,
    ResultForm,
    response_id,
    usage,
)

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": waiting\n\n"
"""A comment: tells proxies between that the connection is alive."""


def event(body: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(body) + b"\n\n"


class ChunkWriter:
    """The chunks of one request."""

    def __init__(
        self,
        form: ResultForm,
        request_id: str,
        num_choices: int,
        *,
        model_name: str,
        created: int,
        include_usage: bool,
    ) -> None:
        """include_usage: a last chunk says what was used, and the others have `usage` null."""
        self._form = form
        self._is_chat = form.url == CHAT_URL
        self._num_choices = num_choices
        self._include_usage = include_usage
        self._shown_chars = [0] * num_choices
        """Of all tokens, for `text_offset`."""
        self._head: dict[str, Any] = {
            "id": response_id(form, request_id),
            "object": "chat.completion.chunk" if self._is_chat else "text_completion",
            "created": created,
            "model": model_name,
        }

    def first(self) -> Iterator[dict[str, Any]]:
        """A chat's choices begin by saying whose turn it is."""
        if self._is_chat:
            for index in range(self._num_choices):
                yield self._chunk(index, {"delta": {"role": "assistant", "content": ""}})

    def delta(self, delta: ChoiceDelta) -> dict[str, Any]:
        shown: dict[str, Any]
        logprobs = delta.logprobs
        if self._is_chat:
            shown = {"delta": {"content": delta.text}}
            if logprobs is not None and self._form.logprobs is not None:
                shown["logprobs"] = chat_logprobs(logprobs, self._form.logprobs)
        else:
            shown = {"text": delta.text}
            if logprobs is not None and self._form.logprobs is not None:
                start = self._shown_chars[delta.index]
                shown["logprobs"] = completion_logprobs(logprobs, self._form.logprobs, start)
                self._shown_chars[delta.index] += sum(len(own.text) for own, *_ in logprobs)
        if self._form.token_ids:
            shown["token_ids"] = delta.token_ids
        return self._chunk(delta.index, shown)

    def last(self, completion: Completion) -> Iterator[dict[str, Any]]:
        """Why each choice ended, and what was used."""
        for index, choice in enumerate(completion.choices):
            ended = {"finish_reason": choice.finish_reason, "stop_reason": choice.stop_reason}
            shown: dict[str, Any] = {"delta": {}} if self._is_chat else {"text": ""}
            yield self._chunk(index, shown | ended)
        if self._include_usage:
            yield {**self._head, "choices": [], "usage": usage(self._form, completion)}

    def _chunk(self, index: int, shown: dict[str, Any]) -> dict[str, Any]:
        choice = {"index": index, "logprobs": None, "finish_reason": None, **shown}
        chunk = {**self._head, "choices": [choice]}
        return chunk | {"usage": None} if self._include_usage else chunk
