"""Chats and completions over HTTP, with OpenAI's own client: whole, streamed, refused, given up."""

import http.client
import json
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from pipemax.client import ChoiceDelta, Submit
from pipemax.proto.errors import RequestError
from pipemax.proto.messages.ingest import (
    Choice,
    Partial,
    Refused,
    RequestDelta,
    TokenLogprob,
)
from pipemax.proto.messages.types import Message
from pipemax.services.serve.completions import read_request
from support.fake_coordinator import FakeCoordinator, finished
from support.http_server import HttpServer

CHAT: Any = [{"role": "user", "content": "hello"}]
CHAT_PATH = "/v1/chat/completions"


def logprobs(*words: str) -> tuple[tuple[TokenLogprob, ...], ...]:
    return tuple((TokenLogprob(5, word, -0.5, 1), TokenLogprob(5, word, -0.5, 1)) for word in words)


def partial(submit: Submit, number: int, *choices: ChoiceDelta) -> Partial:
    found = RequestDelta(request_id=submit.request_id, choices=choices)
    return Partial(number=number, requests=(found,))


def answer(submit: Submit) -> Message | list[Any] | None:
    """What the prompt asks for."""
    prompt = submit.prompt or (submit.messages or ({},))[0].get("content", "")
    if prompt == "wait":
        return None
    if prompt == "refuse":
        return Refused(request_id=submit.request_id, code="too_long", message="too long")
    if prompt == "fail":
        return finished(submit, finish_reason="error", error="it broke")
    if prompt == "drain":
        return Refused(request_id=submit.request_id, code="draining", message="shutting down")
    result = finished(submit, token_ids=(1, 2, 3), text="HELLO")
    if submit.sampling.logprobs is not None:
        result = finished(
            submit, token_ids=(1, 2, 3), text="HELLO", logprobs=logprobs("H", "EL", "LO")
        )
    if submit.sampling.n == 2:
        other = Choice(token_ids=(4,), text="HI", finish_reason="stop", stop_reason="!")
        result = finished(submit, token_ids=(1, 2, 3), text="HELLO", more_choices=(other,))
    if not submit.stream:
        return result
    with_logprobs = submit.sampling.logprobs is not None
    first = ChoiceDelta(
        index=0, token_ids=(1,), text="H", logprobs=logprobs("H") if with_logprobs else None
    )
    if prompt == "fail late":
        broken = finished(submit, finish_reason="error", error="it broke")
        return [partial(submit, 1, first), broken]
    return [partial(submit, 1, first), result]


@pytest.fixture(scope="module")
def coordinator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeCoordinator]:
    with FakeCoordinator(tmp_path_factory.mktemp("c") / "i", answer) as fake:
        yield fake


@pytest.fixture(scope="module")
def server(
    coordinator: FakeCoordinator, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[HttpServer]:
    folder = tmp_path_factory.mktemp("serve")
    with HttpServer(endpoint=coordinator.endpoint, folder=folder) as server:
        yield server


@pytest.fixture
def client(server: HttpServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none needed", max_retries=0) as client:
        yield client


def raw(server: HttpServer, method: str, path: str, body: Any = None, **headers: str) -> Any:
    """Status, headers and body of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    try:
        text = None if body is None else body if isinstance(body, bytes) else json.dumps(body)
        sent = {"Content-Type": "application/json"} if text is not None else {}
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, text, sent | names)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()


def error_of(found: Any) -> dict[str, Any]:
    error = json.loads(found[2])["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return dict(error)


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object) == ("fake", "model")
    assert client.models.retrieve("fake") == model
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other/model")


def test_a_chat(client: openai.OpenAI, coordinator: FakeCoordinator) -> None:
    found = client.chat.completions.create(
        model="fake", messages=CHAT, max_completion_tokens=7, temperature=0.5, stop=["x"]
    )
    assert found.object == "chat.completion"
    assert found.choices[0].message.content == "HELLO"
    assert found.choices[0].message.role == "assistant"
    assert found.choices[0].finish_reason == "length"
    assert found.usage is not None
    assert (found.usage.completion_tokens, found.usage.total_tokens) == (3, 7)
    submit = coordinator.submitted[-1]
    assert submit.messages == tuple(CHAT)
    assert not submit.stream
    assert (submit.sampling.max_tokens, submit.sampling.stop) == (7, ("x",))


def test_a_completion_with_logprobs(client: openai.OpenAI) -> None:
    found = client.completions.create(model="fake", prompt="hello", logprobs=1)
    (choice,) = found.choices
    assert choice.text == "HELLO"
    assert choice.logprobs is not None
    assert choice.logprobs.text_offset == [0, 1, 3]


def test_a_streamed_chat(client: openai.OpenAI, coordinator: FakeCoordinator) -> None:
    options: Any = {"include_usage": True}
    chunks = list(
        client.chat.completions.create(
            model="fake", messages=CHAT, stream=True, stream_options=options, logprobs=True
        )
    )
    assert coordinator.submitted[-1].stream
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    *inner, usage = chunks
    assert all(chunk.usage is None for chunk in inner)
    assert usage.choices == []
    assert usage.usage is not None
    assert (usage.usage.prompt_tokens, usage.usage.completion_tokens) == (4, 3)
    assert inner[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in inner) == "HELLO"
    reasons = [chunk.choices[0].finish_reason for chunk in inner]
    assert reasons == [None] * (len(inner) - 1) + ["length"]
    found = [chunk.choices[0].logprobs for chunk in inner]
    tokens = [token.token for part in found if part is not None for token in part.content or ()]
    assert tokens == ["H", "EL", "LO"]


def test_streamed_choices(client: openai.OpenAI) -> None:
    chunks = list(client.completions.create(model="fake", prompt="hello", n=2, stream=True))
    for index, (text, reason) in enumerate((("HELLO", "length"), ("HI", "stop"))):
        mine = [c for chunk in chunks for c in chunk.choices if c.index == index]
        assert "".join(choice.text for choice in mine) == text
        assert mine[-1].finish_reason == reason
    assert all(chunk.usage is None for chunk in chunks)


def test_offsets_go_on_from_chunk_to_chunk(client: openai.OpenAI) -> None:
    chunks = list(client.completions.create(model="fake", prompt="hello", logprobs=0, stream=True))
    offsets: list[int] = []
    for chunk in chunks:
        if (found := chunk.choices[0].logprobs) is not None:
            offsets += found.text_offset or ()
    assert offsets == [0, 1, 3]


def test_events_as_they_stand_on_the_wire(server: HttpServer) -> None:
    body = {"model": "fake", "prompt": [5, 6], "stream": True}
    status, headers, text = raw(server, "POST", "/v1/completions", body)
    assert status == 200
    assert headers["content-type"].startswith("text/event-stream")
    *events, end = text.decode().split("\n\n")
    assert (events[-1], end) == ("data: [DONE]", "")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-1]]
    assert [t for chunk in chunks for t in chunk["choices"][0].get("token_ids", ())] == [1, 2, 3]
    assert "usage" not in chunks[0]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("content", "kind", "code"),
    [
        ("refuse", openai.BadRequestError, "too_long"),
        ("fail", openai.InternalServerError, "failed"),
        ("drain", openai.InternalServerError, "draining"),
    ],
)
def test_what_the_system_refuses(
    client: openai.OpenAI, content: str, kind: type[openai.APIStatusError], code: str, stream: bool
) -> None:
    with pytest.raises(kind) as caught:
        client.completions.create(model="fake", prompt=content, stream=stream)
    assert caught.value.code == code
    assert ("retry-after" in caught.value.response.headers) == (code == "draining")


def test_a_failure_after_the_first_token_is_an_event(client: openai.OpenAI) -> None:
    stream = client.completions.create(model="fake", prompt="fail late", stream=True)
    assert next(stream).choices[0].text == "H"
    with pytest.raises(openai.APIError, match="it broke"):
        list(stream)


@pytest.mark.parametrize(
    ("changes", "status", "code"),
    [
        ({"model": "other"}, 404, "model_not_found"),
        ({"tools": [{"type": "function"}]}, 400, "not_implemented"),
        ({"wings": 2}, 400, "unknown_field"),
        ({"temperature": "hot"}, 400, "invalid_field"),
        ({"stream": "yes"}, 400, "invalid_field"),
        ({"stream_options": {"include_usage": True}}, 400, "invalid_field"),
        ({"stream": True, "stream_options": {"wings": 2}}, 400, "unknown_field"),
        ({"stream": True, "prompt_logprobs": 1}, 400, "not_implemented"),
    ],
)
def test_refused_by_name(
    server: HttpServer, changes: dict[str, Any], status: int, code: str
) -> None:
    found = raw(server, "POST", CHAT_PATH, {"model": "fake", "messages": CHAT, **changes})
    assert found[0] == status
    error = error_of(found)
    assert error["code"] == code
    assert next(iter(changes)) in error["message"] or "stream" in error["message"]


def test_an_echo_is_not_streamed() -> None:
    body = {"model": "m", "prompt": "a", "stream": True, "echo": True}
    with pytest.raises(RequestError, match="'stream' together with 'echo'"):
        read_request(body, "/v1/completions", "m")


@pytest.mark.parametrize(
    ("body", "headers", "status", "code"),
    [
        (b"{", {}, 400, "invalid_json"),
        (b"[]", {}, 400, "invalid_json"),
        (b"\xff", {}, 400, "invalid_json"),
        (b"[" * 100_000, {}, 400, "invalid_json"),
        (b"{}", {"Content_Type": "text/plain"}, 415, "content_type"),
        (b" " * (4 * 2**20 + 1), {}, 413, "too_large"),
    ],
)
def test_what_is_no_request(
    server: HttpServer, body: bytes, headers: dict[str, str], status: int, code: str
) -> None:
    found = raw(server, "POST", CHAT_PATH, body, **headers)
    assert (found[0], error_of(found)["code"]) == (status, code)


def test_chunked_bodies_are_bounded_too(server: HttpServer) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    try:
        pieces = (b" " * 2**20 for _ in range(8))
        headers = {"Content-Type": "application/json"}
        connection.request("POST", CHAT_PATH, pieces, headers, encode_chunked=True)
        assert connection.getresponse().status == 413
    finally:
        connection.close()


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/responses", "/v1/chat/completions/", "/"])
def test_other_endpoints_are_refused_by_name(server: HttpServer, path: str) -> None:
    found = raw(server, "POST", path, {})
    assert found[0] == 404
    error = error_of(found)
    assert error["code"] == "unknown_url"
    assert path in error["message"]


def test_other_methods(server: HttpServer) -> None:
    found = raw(server, "GET", CHAT_PATH)
    assert (found[0], found[1]["allow"]) == (405, "POST")
    assert error_of(found)["code"] == "method_not_allowed"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_cancels(
    server: HttpServer, coordinator: FakeCoordinator, stream: bool
) -> None:
    before = len(coordinator.submitted)
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    body = json.dumps({"model": "fake", "prompt": "wait", "stream": stream})
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    deadline = time.monotonic() + 30
    while len(coordinator.submitted) == before:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    request_id = coordinator.submitted[-1].request_id
    connection.close()
    while request_id not in coordinator.cancelled:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_metrics(server: HttpServer, client: openai.OpenAI) -> None:
    client.models.retrieve("fake")
    status, headers, text = raw(server, "GET", "/metrics")
    assert status == 200
    assert headers["content-type"].startswith("text/plain")
    lines = text.decode().splitlines()
    assert any(
        line.startswith('pipemax_http_requests_total{endpoint="/v1/models/{model}",status="200"}')
        for line in lines
    )
    assert "pipemax_http_system_connected 1.0" in lines
