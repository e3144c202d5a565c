"""Results as OpenAI's batch output has them."""

import dataclasses
import json
from typing import Any

import msgspec

from pipemax.client import Completion
from pipemax.proto.messages.ingest import Choice, TokenLogprob
from pipemax.services.batch.openai_lines import BatchRequest
from pipemax.services.batch.openai_logprobs import chat_logprobs
from pipemax.services.batch.openai_results import CHAT_URL, error_line, result_line
from support.openai_lines import line, parse


def shown(request: BatchRequest, completion: Completion, **about: Any) -> bytes:
    return result_line(request.custom_id, request.form, completion, **about)


COMPLETION = Completion(
    request_id="r-1",
    token_ids=(5, 6, 7),
    text="flows é",
    finish_reason="stop",
    stop_reason="end",
    num_prompt_tokens=4,
)


def test_completion_line_out() -> None:
    written = shown(parse(line()), COMPLETION, model_name="m", created=123)
    assert b"\n" not in written
    assert json.loads(written) == {
        "id": "batch_req_r-1",
        "custom_id": "c",
        "response": {
            "status_code": 200,
            "request_id": "r-1",
            "body": {
                "id": "cmpl-r-1",
                "object": "text_completion",
                "created": 123,
                "model": "m",
                "choices": [
                    {
                        "index": 0,
                        "text": "flows é",
                        "logprobs": None,
                        "finish_reason": "stop",
                        "stop_reason": "end",
                    }
                ],
                "usage": {"prompt_tokens": 4, "completion_tokens": 3, "total_tokens": 7},
            },
        },
        "error": None,
    }


def test_chat_line_out() -> None:
    request = parse(line(CHAT_URL))
    body = json.loads(shown(request, COMPLETION, model_name="m", created=1))
    body = body["response"]["body"]
    assert body["object"] == "chat.completion"
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "flows é"}
    assert "token_ids" not in body["choices"][0]


A, B, E = (TokenLogprob(i, t, -0.5 * i, i) for i, t in ((1, "a"), (2, "b"), (3, "é")))
FIRST = TokenLogprob(9, "<s>", None, 0)
WITH_LOGPROBS = Completion(
    request_id="r-1",
    token_ids=(3, 1),
    text="éa",
    finish_reason="length",
    logprobs=((E, A, B), (A, A, B)),
    prompt_logprobs=((FIRST,), (B, A, B)),
    num_prompt_tokens=2,
)


def body_of(request: BatchRequest) -> dict[str, Any]:
    completion = dataclasses.replace(
        WITH_LOGPROBS, prompt_text="b" if request.submit.echo else None
    )
    body: dict[str, Any] = json.loads(shown(request, completion, model_name="m", created=1))[
        "response"
    ]["body"]
    return body


def test_several_choices() -> None:
    assert parse(line(n=3, best_of=3)).submit.sampling.n == 3
    more = (
        Choice(token_ids=(1,), text="a", finish_reason="stop", stop_reason="x"),
        Choice(token_ids=(2, 2, 2), text="bbb", finish_reason="length", logprobs=((B,),) * 3),
    )
    several = dataclasses.replace(WITH_LOGPROBS, more_choices=more)
    request = parse(line(CHAT_URL, n=3, logprobs=True))
    body = json.loads(shown(request, several, model_name="m", created=1))["response"]["body"]
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert [choice["message"]["content"] for choice in body["choices"]] == ["éa", "a", "bbb"]
    assert [choice["finish_reason"] for choice in body["choices"]] == ["length", "stop", "length"]
    assert [len(choice["logprobs"]["content"]) for choice in body["choices"]] == [2, 0, 3]
    assert body["choices"][1]["stop_reason"] == "x"
    assert body["usage"] == {"prompt_tokens": 2, "completion_tokens": 6, "total_tokens": 8}


def test_logprobs_of_a_completion() -> None:
    (choice,) = body_of(parse(line(logprobs=1)))["choices"]
    assert choice["text"] == "éa"
    assert choice["logprobs"] == {
        "tokens": ["é", "a"],
        "token_logprobs": [-1.5, -0.5],
        "top_logprobs": [{"é": -1.5, "a": -0.5}, {"a": -0.5}],
        "text_offset": [0, 1],
    }
    assert "prompt_logprobs" not in choice


def test_echo_puts_the_prompt_first() -> None:
    request = parse(line(logprobs=2, echo=True))
    assert request.submit.echo
    assert request.submit.sampling.prompt_logprobs == 2
    (choice,) = body_of(request)["choices"]
    assert choice["text"] == "béa"
    assert choice["logprobs"]["tokens"] == ["<s>", "b", "é", "a"]
    assert choice["logprobs"]["token_logprobs"] == [None, -1.0, -1.5, -0.5]
    assert choice["logprobs"]["top_logprobs"][0] is None
    assert choice["logprobs"]["text_offset"] == [0, 3, 4, 5]
    assert parse(line(echo=True)).submit.sampling.prompt_logprobs is None


def test_echo_of_the_prompt_alone() -> None:
    request = parse(line(logprobs=0, echo=True, max_tokens=0, prompt=[9, 2]))
    assert request.submit.sampling.max_tokens == 1
    body = body_of(request)
    (choice,) = body["choices"]
    assert (choice["text"], choice["finish_reason"], choice["token_ids"]) == ("b", "length", [])
    assert choice["logprobs"]["token_logprobs"] == [None, -1.0]
    assert body["usage"] == {"prompt_tokens": 2, "completion_tokens": 0, "total_tokens": 2}


def test_prompt_logprobs() -> None:
    expected = {
        "2": {"logprob": -1.0, "rank": 2, "decoded_token": "b"},
        "1": {"logprob": -0.5, "rank": 1, "decoded_token": "a"},
    }
    (choice,) = body_of(parse(line(prompt_logprobs=2)))["choices"]
    assert choice["prompt_logprobs"] == [None, expected]
    assert body_of(parse(line(CHAT_URL, prompt_logprobs=2)))["prompt_logprobs"] == [None, expected]


def test_logprobs_of_a_chat() -> None:
    (choice,) = body_of(parse(line(CHAT_URL, logprobs=True, top_logprobs=1)))["choices"]
    first = {"token": "é", "logprob": -1.5, "bytes": [195, 169]}
    likeliest = {"token": "a", "logprob": -0.5, "bytes": [97]}
    assert choice["logprobs"]["content"] == [
        {**first, "top_logprobs": [likeliest]},
        {**likeliest, "top_logprobs": [likeliest]},
    ]
    (choice,) = body_of(parse(line(CHAT_URL, logprobs=True)))["choices"]
    assert choice["logprobs"]["content"][0] == {**first, "top_logprobs": []}


def test_what_json_cannot_say_is_very_unlikely() -> None:
    never = msgspec.structs.replace(A, logprob=float("-inf"))
    assert chat_logprobs(((never,),), 0)["content"][0]["logprob"] == -9999.0


def test_token_ids_in_give_token_ids_out() -> None:
    written = shown(parse(line(prompt=[1, 2])), COMPLETION, model_name="m", created=1)
    assert json.loads(written)["response"]["body"]["choices"][0]["token_ids"] == [5, 6, 7]


def test_error_line_out() -> None:
    written = error_line(None, "r-1", status=400, code="invalid_json", message="bad", line=3)
    assert json.loads(written) == {
        "id": "batch_req_r-1",
        "custom_id": None,
        "response": {"status_code": 400, "request_id": "r-1", "body": None},
        "error": {"message": "bad", "code": "invalid_json", "line": 3},
    }
