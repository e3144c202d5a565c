"""What holds for every request, before and around its endpoint."""

import contextlib
import ipaddress
import logging
import secrets
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipemax.proto.errors import RequestError
from pipemax.services.serve.errors import ApiError
from pipemax.services.serve.metrics import ServeMetrics, endpoint_of
from pipemax.services.serve.settings import ServeSettings

log = logging.getLogger(__name__)

_ALWAYS_ANSWERED = ("/health", "/metrics")
_KEPT = "/v1/"
"""Paths that keys are for."""
_CLIENT_CLOSED = 499


class Guard:
    """Keys, hosts, the limit on requests at once, metrics."""

    def __init__(self, app: ASGIApp, settings: ServeSettings, metrics: ServeMetrics) -> None:
        self._app = app
        self._settings = settings
        self._metrics = metrics
        self._running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started_at = time.monotonic()
        status = _CLIENT_CLOSED
        request_id = secrets.token_hex(12)

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            try:
                self._check(scope)
                with self._counted(scope["path"]):
                    await self._app(scope, receive, noting)
            except ApiError as error:
                await answer_error(error)(scope, receive, noting)
        finally:
            endpoint = endpoint_of(scope["path"])
            self._metrics.requests.labels(endpoint, str(status)).inc()
            self._metrics.seconds.labels(endpoint).observe(time.monotonic() - started_at)

    def _check(self, scope: Scope) -> None:
        """Raises ApiError for a request that is not to be answered."""
        headers = Headers(scope=scope)
        if not self._settings.keys:
            if not self._settings.insecure:
                check_host(headers, self._settings.host)
        elif scope["path"].startswith(_KEPT) and not self._settings.keys.admit(
            headers.get("authorization")
        ):
            raise ApiError(
                401,
                "invalid_api_key",
                "a valid API key is needed: send it as `Authorization: Bearer KEY`",
                headers={"WWW-Authenticate": "Bearer"},
            )

    @contextlib.contextmanager
    def _counted(self, path: str) -> Iterator[None]:
        if path in _ALWAYS_ANSWERED:
            yield
            return
        most = self._settings.max_concurrent_requests
        if self._running >= most:
            raise ApiError(
                429,
                "too_many_requests",
                f"{most} requests are being answered, which is this server's limit; try again, "
                "or put them into one batch",
            )
        self._running += 1
        self._metrics.in_progress.set(self._running)
        try:
            yield
        finally:
            self._running -= 1
            self._metrics.in_progress.set(self._running)


def check_host(headers: Headers, host: str) -> None:
    """Without a key, a page of another site in a browser of this machine must not be able to use
    the server. Raises ApiError when a request is for another host, as with a name that was made to
    point here, or comes from another site's page."""
    asked = _host_of("//" + headers.get("host", ""))
    if not _is_ours(asked, host):
        raise ApiError(403, "host", f"this server is not {asked!r:.80}; set an API key to allow it")
    origin = headers.get("origin")
    if origin is not None and not _is_ours(_host_of(origin), host):
        raise ApiError(403, "origin", f"requests of {origin!r:.80} need an API key")


def _host_of(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _is_ours(asked: str, host: str) -> bool:
    if asked in ("localhost", host.strip("[]")):
        return True
    try:
        return ipaddress.ip_address(asked).is_loopback
    except ValueError:
        return False


def answer_error(error: ApiError) -> Response:
    return JSONResponse(error.body(), error.status, error.headers)


async def on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return answer_error(error)


async def on_request_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return answer_error(ApiError.of(error))


async def on_http_error(request: Request, error: Exception) -> Response:
    """Starlette's own: no such path, no such method."""
    assert isinstance(error, HTTPException)
    method, path = request.method, request.url.path
    if error.status_code == 405:
        text = f"{path} does not take {method}"
        headers = dict(error.headers or {})
        return answer_error(ApiError(405, "method_not_allowed", text, headers=headers))
    served = "/v1/chat/completions, /v1/completions, /v1/models, /v1/files and /v1/batches"
    text = f"not implemented: {path!r:.200}; this server has {served}"
    return answer_error(ApiError(error.status_code, "unknown_url", text))


async def on_disconnect(request: Request, error: Exception) -> Response:
    return Response(status_code=_CLIENT_CLOSED)  # nobody is there to read it


async def on_failure(request: Request, error: Exception) -> Response:
    text = "the server failed; its log says why"
    return answer_error(ApiError(500, "internal_error", text))


HANDLERS: dict[Any, Any] = {
    ApiError: on_api_error,
    RequestError: on_request_error,
    HTTPException: on_http_error,
    ClientDisconnect: on_disconnect,
    Exception: on_failure,
}
