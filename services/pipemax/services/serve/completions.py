"""`/v1/chat/completions` and `/v1/completions`."""

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
from msgspec.structs import replace
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pipemax.client import Completion, Submit
from pipemax.services.batch.openai_bodies import LineError, parse_body
from pipemax.services.batch.openai_results import ResultForm, result_body
from pipemax.services.serve.body import read_json
from pipemax.services.serve.bridge import Bridge, Ticket
from pipemax.services.serve.chunks import DONE, KEEP_ALIVE, ChunkWriter, event
from pipemax.services.serve.errors import ApiError
from pipemax.services.serve.settings import ServeSettings

T = TypeVar("T")
_ERROR_STATUS_S = 10.0
"""A stream begins after so long even if nothing has come; until then an error has a status."""
_KEEP_ALIVE_S = 15.0
_SEND_TIMEOUT_S = 300.0
"""A reader that takes nothing for so long is given up."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What a body asks for."""

    submit: Submit
    form: ResultForm
    include_usage: bool


def read_request(body: dict[str, Any], url: str, model_name: str) -> Asked:
    """As a batch line with this body, and whether it is to be streamed, which lines cannot be.
    Raises LineError."""
    rest = dict(body)
    stream, options = rest.pop("stream", None), rest.pop("stream_options", None)
    if not isinstance(stream, bool | None):
        raise LineError("invalid_field", f"stream must be true or false, not {stream!r:.40}")
    include_usage = _stream_options(options, bool(stream))
    submit, form = parse_body(rest, url, model_name, secrets.token_hex(12))
    if not stream:
        return Asked(submit, form, False)
    for name, asked in (
        ("echo", submit.echo),
        ("prompt_logprobs", submit.sampling.prompt_logprobs is not None),
    ):
        if asked:
            raise LineError("not_implemented", f"not implemented: 'stream' together with {name!r}")
    return Asked(replace(submit, stream=True), form, include_usage)


def _stream_options(options: object, stream: bool) -> bool:
    """Whether usage is asked for."""
    if options is None:
        return False
    if not stream:
        raise LineError("invalid_field", "stream_options goes with stream being true")
    if not isinstance(options, dict):
        raise LineError("invalid_field", "stream_options must be an object")
    for name in options:
        if name != "include_usage":
            raise LineError("unknown_field", f"unknown field 'stream_options.{name:.80}'")
    include_usage = options.get("include_usage")
    if not isinstance(include_usage, bool | None):
        raise LineError("invalid_field", "stream_options.include_usage must be true or false")
    return bool(include_usage)


class Completions:
    """The endpoints."""

    def __init__(self, bridge: Bridge, settings: ServeSettings) -> None:
        self._bridge = bridge
        self._settings = settings

    async def answer(self, request: Request) -> Response:
        model_name = self._bridge.model.name
        most_bytes, timeout_s = self._settings.max_body_bytes, self._settings.body_timeout_s
        body = await read_json(request, most_bytes, timeout_s)
        asked = read_request(body, request.url.path, model_name)
        ticket = self._bridge.submit(asked.submit)
        try:
            if asked.submit.stream:
                return await self._stream(request, asked, ticket, model_name)
            completion = await or_gone(request, ticket.completion())
        except BaseException:
            self._bridge.cancel(ticket)
            raise
        if completion.error is not None:
            raise ApiError.of_completion(completion)
        created = int(time.time())
        found = result_body(asked.form, completion, model_name=model_name, created=created)
        return Response(msgspec.json.encode(found), media_type="application/json")

    async def _stream(
        self, request: Request, asked: Asked, ticket: Ticket, model_name: str
    ) -> Response:
        with contextlib.suppress(TimeoutError):
            await or_gone(request, asyncio.wait_for(ticket.begun(), _ERROR_STATUS_S))
        if (failed := ticket.failure) is not None:
            raise ApiError.of_completion(failed)
        writer = ChunkWriter(
            asked.form,
            asked.submit.request_id,
            asked.submit.sampling.n,
            model_name=model_name,
            created=int(time.time()),
            include_usage=asked.include_usage,
        )
        return EventStream(self._bridge, ticket, writer)


class EventStream(Response):
    """Server-sent events, until the request is done or its reader gone."""

    def __init__(self, bridge: Bridge, ticket: Ticket, writer: ChunkWriter) -> None:
        super().__init__(
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )
        del self.headers["content-length"]
        self._bridge = bridge
        self._ticket = ticket
        self._writer = writer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with contextlib.suppress(ClientDisconnect, TimeoutError, OSError):
                await or_gone(Request(scope, receive), self._send(send))
        finally:
            self._bridge.cancel(self._ticket)

    async def _send(self, send: Send) -> None:
        await send(
            {
                "type": "http.response.start",
                "status": self.status_code,
                "headers": self.raw_headers,
            }
        )
        async for piece in self._events():
            async with asyncio.timeout(_SEND_TIMEOUT_S):
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _events(self) -> AsyncIterator[bytes]:
        for chunk in self._writer.first():
            yield event(chunk)
        while True:
            try:
                news = await asyncio.wait_for(self._ticket.next(), _KEEP_ALIVE_S)
            except TimeoutError:
                yield KEEP_ALIVE
                continue
            if isinstance(news, Completion):
                break
            yield b"".join(event(self._writer.delta(delta)) for delta in news)
        if news.error is not None:
            yield event(ApiError.of_completion(news).body())
            return
        yield b"".join(event(chunk) for chunk in self._writer.last(news)) + DONE


async def or_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What `work` comes to. Raises ClientDisconnect, and cancels it, when the client leaves before;
    the request's body has been read."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_until_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for unfinished in (task, gone):
            unfinished.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
