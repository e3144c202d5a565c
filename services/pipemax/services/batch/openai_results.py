"""OpenAI batch lines: a completion, or an error, to a line of JSON.

A line is `{"id", "custom_id", "response", "error"}`.
"""

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from pipemax.client import Completion
from pipemax.proto.messages.ingest import Choice
from pipemax.services.batch.openai_logprobs import (
    chat_logprobs,
    completion_logprobs,
    prompt_logprobs,
)

CHAT_URL: Literal["/v1/chat/completions"] = "/v1/chat/completions"
COMPLETIONS_URL: Literal["/v1/completions"] = "/v1/completions"


class ResultForm(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """What an output line shows, by what its input line asked for."""

    url: str = ""
    token_ids: bool = False
    """The prompt was given as token ids: so is the output, beside the text."""
    logprobs: int | None = None
    """So many likeliest tokens of each position."""
    prompt_logprobs: bool = False
    """By themselves, not as a part of an echo."""
    echo: bool = False
    """The prompt goes before the output."""
    output: bool = True
    """False for an echo of the prompt alone."""


def result_line(
    custom_id: str, form: ResultForm, completion: Completion, *, model_name: str, created: int
) -> bytes:
    """The output line of a request that was served, without its line break. `created` is a Unix
    time in seconds."""
    body = result_body(form, completion, model_name=model_name, created=created)
    response = {"status_code": 200, "request_id": completion.request_id, "body": body}
    return _line(completion.request_id, custom_id, response, None)


def result_body(
    form: ResultForm, completion: Completion, *, model_name: str, created: int
) -> dict[str, Any]:
    """What the endpoint answers."""
    is_chat = form.url == CHAT_URL
    body: dict[str, Any] = {
        "id": response_id(form, completion.request_id),
        "object": "chat.completion" if is_chat else "text_completion",
        "created": created,
        "model": model_name,
        "choices": [
            {"index": index, **_choice(form, completion, choice)}
            for index, choice in enumerate(completion.choices)
        ],
        "usage": usage(form, completion),
    }
    if is_chat and form.prompt_logprobs:
        body["prompt_logprobs"] = prompt_logprobs(completion.prompt_logprobs or ())
    return body


def partial_body(
    form: ResultForm, completion: Completion, *, model_name: str, created: int
) -> dict[str, Any] | None:
    """Of a request that failed on its way; None if it had not produced anything."""
    if not completion.num_output_tokens:
        return None
    return result_body(form, completion, model_name=model_name, created=created)


def response_id(form: ResultForm, request_id: str) -> str:
    return f"{'chatcmpl' if form.url == CHAT_URL else 'cmpl'}-{request_id}"


def usage(form: ResultForm, completion: Completion) -> dict[str, int]:
    """Tokens, as they are accounted for."""
    prompt_tokens = completion.num_prompt_tokens
    output_tokens = completion.num_output_tokens if form.output else 0
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": output_tokens,
        "total_tokens": prompt_tokens + output_tokens,
    }


def _choice(form: ResultForm, completion: Completion, choice: Choice) -> dict[str, Any]:
    shown: dict[str, Any] = {}
    if form.url == CHAT_URL:
        shown["message"] = {"role": "assistant", "content": choice.text}
        if form.logprobs is None:
            shown["logprobs"] = None
        else:
            shown["logprobs"] = chat_logprobs(choice.logprobs or (), form.logprobs)
    else:
        shown["text"] = (completion.prompt_text or "") + (choice.text if form.output else "")
        shown["logprobs"] = _completion_logprobs(form, completion, choice)
    if form.output:
        shown |= {"finish_reason": choice.finish_reason, "stop_reason": choice.stop_reason}
    else:
        shown |= {"finish_reason": "length", "stop_reason": None}
    if form.url == COMPLETIONS_URL and form.prompt_logprobs:
        shown["prompt_logprobs"] = prompt_logprobs(completion.prompt_logprobs or ())
    if form.token_ids:
        shown["token_ids"] = choice.token_ids if form.output else ()
    return shown


def _completion_logprobs(
    form: ResultForm, completion: Completion, choice: Choice
) -> dict[str, Any] | None:
    if form.logprobs is None:
        return None
    positions = choice.logprobs or () if form.output else ()
    if form.echo:
        positions = (*(completion.prompt_logprobs or ()), *positions)
    return completion_logprobs(positions, form.logprobs)


def error_line(
    custom_id: str | None,
    request_id: str,
    *,
    status: int,
    code: str,
    message: str,
    line: int | None = None,
    file: str | None = None,
    body: Mapping[str, Any] | None = None,
) -> bytes:
    """The output line of a request that was not served, without its line break. `line` is the
    number of its input line, from 1, where it is known; `file` where there are several; `body` what
    it had produced before it failed."""
    response = {"status_code": status, "request_id": request_id, "body": body}
    error: dict[str, Any] = {"message": message, "code": code}
    if line is not None:
        error["line"] = line
    if file is not None:
        error["file"] = file
    return _line(request_id, custom_id, response, error)


def _line(
    request_id: str,
    custom_id: str | None,
    response: Mapping[str, Any],
    error: Mapping[str, Any] | None,
) -> bytes:
    return msgspec.json.encode(
        {
            "id": f"batch_req_{request_id}",
            "custom_id": custom_id,
            "response": response,
            "error": error,
        }
    )
