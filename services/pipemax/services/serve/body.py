"""Bodies of requests, bounded in size and in time."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import msgspec
from starlette.requests import ClientDisconnect, Request

from pipemax.services.serve.errors import ApiError

_LINGER_S = 2.0
_LINGER_BYTES = 64 * 2**20
"""What is left of a body that is refused is read for so long and so far: a sender that is cut off
while it sends may not see why."""


async def pieces(request: Request, most_bytes: int, timeout_s: float) -> AsyncIterator[bytes]:
    """A body as it comes. Raises ApiError when it is larger than that, or nothing comes for so
    long; ClientDisconnect when its sender left."""
    size_bytes = 0
    stream = request.stream()
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > most_bytes:
        await _linger(stream)
        raise _too_large(most_bytes)
    while True:
        try:
            async with asyncio.timeout(timeout_s):
                piece = await anext(stream, None)
        except TimeoutError:
            text = f"nothing of the body came for {timeout_s:g} s"
            raise ApiError(408, "timeout", text, headers={"Connection": "close"}) from None
        if piece is None:
            return
        size_bytes += len(piece)
        if size_bytes > most_bytes:
            await _linger(stream)
            raise _too_large(most_bytes)
        yield piece


async def _linger(stream: AsyncIterator[bytes]) -> None:
    left = _LINGER_BYTES
    with contextlib.suppress(TimeoutError, ClientDisconnect):
        async with asyncio.timeout(_LINGER_S):
            async for piece in stream:
                left -= len(piece)
                if left <= 0:
                    return


def _too_large(most_bytes: int) -> ApiError:
    return ApiError(
        413,
        "too_large",
        f"the body is larger than {most_bytes} bytes, which is this server's limit",
        headers={"Connection": "close"},
    )


async def read_json(request: Request, most_bytes: int, timeout_s: float) -> dict[str, Any]:
    """The object that the body is. Raises ApiError for anything else."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "content_type", "send the header `Content-Type: application/json`")
    text = b"".join([piece async for piece in pieces(request, most_bytes, timeout_s)])
    try:
        found = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(400, "invalid_json", f"the body is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ApiError(400, "invalid_json", "the body must be an object")
    return found
