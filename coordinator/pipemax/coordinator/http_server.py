"""A small HTTP server: GET and HEAD of a few resources that are computed in no time.

One thread, apart from the coordinator's loop, which never waits for it. What a client can cost is
bounded: so many connections, so many bytes of request, so many seconds for all of it; each
connection is closed after one answer.
"""

import asyncio
import contextlib
import logging
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from urllib.parse import parse_qs, urlsplit

MOST_CONNECTIONS = 32
MOST_REQUEST_BYTES = 8192
REQUEST_S = 10.0
"""From connecting to having the whole answer."""
_BACKLOG = 64
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
_HEADERS = {
    "Cache-Control": "no-store",
    "Connection": "close",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Request:
    path: str
    query: Mapping[str, str]
    """The first value of each name."""
    headers: Mapping[str, str]
    """By name in lower case."""


@dataclass(frozen=True, slots=True)
class Reply:
    body: bytes
    content_type: str = "text/plain; charset=utf-8"
    status: HTTPStatus = HTTPStatus.OK
    headers: Mapping[str, str] = field(default_factory=dict)


Resource = Callable[[Request], Reply]


class HttpServer:
    """Serves `resources` by path from construction to `close`."""

    def __init__(self, host: str, port: int, resources: Mapping[str, Resource]) -> None:
        """Raises OSError when it cannot listen there. Port 0 takes a free one."""
        self._resources = resources
        self._local_only = host in _LOOPBACK
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.create_server((host, port), family=family, backlog=_BACKLOG)
        self.port: int = self._socket.getsockname()[1]
        self._open: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, name="http", daemon=True)
        self._thread.start()
        self._started.wait()

    @property
    def connections(self) -> int:
        """Open now; from any thread."""
        return len(self._open)

    def close(self) -> None:
        """Ends it, and what is under way."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _run(self) -> None:
        loop = self._loop
        server = loop.run_until_complete(
            asyncio.start_server(self._accept, sock=self._socket, limit=MOST_REQUEST_BYTES)
        )
        self._started.set()
        try:
            loop.run_forever()
        finally:
            server.close()
            loop.run_until_complete(self._end_all())
            loop.close()

    async def _end_all(self) -> None:
        tasks = list(self._open)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._open) >= MOST_CONNECTIONS:
            writer.transport.abort()
            return
        task = self._loop.create_task(self._serve(reader, writer))
        self._open.add(task)
        task.add_done_callback(self._open.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(REQUEST_S):
                writer.write(await self._answer(reader))
                await writer.drain()
                writer.close()
                await writer.wait_closed()
        except (TimeoutError, OSError, asyncio.IncompleteReadError):
            pass  # it was too slow, or has gone
        finally:
            writer.transport.abort()

    async def _answer(self, reader: asyncio.StreamReader) -> bytes:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.LimitOverrunError:
            status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
            return _written(_error(status, f"more than {MOST_REQUEST_BYTES} bytes of request"))
        try:
            method, target, headers = _parsed(head)
        except ValueError:
            return _written(_error(HTTPStatus.BAD_REQUEST, "this is no HTTP request"))
        reply = self._reply(method, target, headers)
        return _written(reply, with_body=method != "HEAD")

    def _reply(self, method: str, target: str, headers: Mapping[str, str]) -> Reply:
        if self._local_only and not _is_local(headers.get("host")):
            # A page of elsewhere whose name was made to point here must not read ours.
            return _error(HTTPStatus.MISDIRECTED_REQUEST, "served under localhost only")
        if method not in ("GET", "HEAD"):
            return _error(HTTPStatus.METHOD_NOT_ALLOWED, "GET only", {"Allow": "GET, HEAD"})
        url = urlsplit(target)
        resource = self._resources.get(url.path)
        if resource is None:
            known = ", ".join(sorted(self._resources))
            return _error(HTTPStatus.NOT_FOUND, f"there are only {known}")
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        try:
            return resource(Request(url.path, query, headers))
        except Exception:
            log.exception("GET %s failed", url.path)
            return _error(HTTPStatus.INTERNAL_SERVER_ERROR, "see the coordinator's log")


def _parsed(head: bytes) -> tuple[str, str, dict[str, str]]:
    """(method, target, headers). Raises ValueError."""
    first, *lines = head.decode("latin-1").split("\r\n")[:-2]
    method, target, version = first.split(" ")
    if not version.startswith("HTTP/1.") or not target.startswith("/"):
        raise ValueError(first)
    headers = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon:
            raise ValueError(line)
        headers[name.strip().lower()] = value.strip()
    return method, target, headers


def _is_local(host: str | None) -> bool:
    if host is None:
        return True  # no browser
    with contextlib.suppress(ValueError):
        return urlsplit(f"//{host}").hostname in _LOOPBACK
    return False


def _error(status: HTTPStatus, text: str, headers: Mapping[str, str] | None = None) -> Reply:
    return Reply(f"{status.phrase}: {text}\n".encode(), status=status, headers=headers or {})


def _written(reply: Reply, *, with_body: bool = True) -> bytes:
    headers = {
        "Content-Type": reply.content_type,
        "Content-Length": str(len(reply.body)),
        **_HEADERS,
        **reply.headers,
    }
    lines = [f"HTTP/1.1 {reply.status.value} {reply.status.phrase}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    head = ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")
    return head + reply.body if with_body else head
