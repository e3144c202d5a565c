"""The HTTP server: what it answers, and what a client may cost."""

import socket
from collections.abc import Iterator
from http import HTTPStatus

import pytest

from pipemax.coordinator import http_server
from pipemax.coordinator.http_server import (
    MOST_CONNECTIONS,
    MOST_REQUEST_BYTES,
    HttpServer,
    Reply,
    Request,
)
from support.command import eventually


def echo(request: Request) -> Reply:
    return Reply(repr(sorted(request.query.items())).encode())


def broken(request: Request) -> Reply:
    raise ZeroDivisionError


def large(request: Request) -> Reply:
    return Reply(b"x" * 30_000_000)


@pytest.fixture
def server() -> Iterator[HttpServer]:
    made = HttpServer("127.0.0.1", 0, {"/": echo, "/broken": broken, "/large": large})
    yield made
    made.close()


def connect(server: HttpServer) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=30)


def ask(server: HttpServer, text: str) -> tuple[int, str, bytes]:
    """(status, head, body) of the answer to a request given by its lines."""
    with connect(server) as client:
        client.sendall(text.replace("\n", "\r\n").encode() + b"\r\n\r\n")
        return read(client)


def read(client: socket.socket) -> tuple[int, str, bytes]:
    found = b""
    while more := client.recv(65536):
        found += more
    head, _, body = found.partition(b"\r\n\r\n")
    return int(head.split()[1]), head.decode(), body


def is_cut_off(client: socket.socket) -> bool:
    """Sends another byte of its request: it is not waited for any more."""
    try:
        client.send(b"T")
    except ConnectionError:
        return True
    return False


def test_get_and_head(server: HttpServer) -> None:
    status, head, body = ask(server, "GET /?a=1&b=%20x&a=2 HTTP/1.1\nHost: localhost:1")
    assert (status, body) == (200, b"[('a', '1'), ('b', ' x')]")
    assert f"Content-Length: {len(body)}" in head
    assert "default-src 'none'" in head
    assert "X-Content-Type-Options: nosniff" in head
    status, head, body = ask(server, "HEAD /?a=1 HTTP/1.1\nHost: localhost")
    assert (status, body) == (200, b"")
    assert "Content-Length: 12" in head


@pytest.mark.parametrize(
    ("request_text", "status"),
    [
        ("POST / HTTP/1.1\nHost: localhost", HTTPStatus.METHOD_NOT_ALLOWED),
        ("DELETE / HTTP/1.1\nHost: localhost", HTTPStatus.METHOD_NOT_ALLOWED),
        ("GET /../etc/passwd HTTP/1.1\nHost: localhost", HTTPStatus.NOT_FOUND),
        ("GET / HTTP/9", HTTPStatus.BAD_REQUEST),
        ("GET http://elsewhere/ HTTP/1.1", HTTPStatus.BAD_REQUEST),
        ("GET / HTTP/1.1\nno colon", HTTPStatus.BAD_REQUEST),
        ("\0\1\2", HTTPStatus.BAD_REQUEST),
        ("GET /broken HTTP/1.1", HTTPStatus.INTERNAL_SERVER_ERROR),
        ("GET /?" + "x" * MOST_REQUEST_BYTES, HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE),
        ("GET / HTTP/1.1\nHost: rebound.example", HTTPStatus.MISDIRECTED_REQUEST),
        ("GET / HTTP/1.1\nHost: [", HTTPStatus.MISDIRECTED_REQUEST),
        ("GET / HTTP/1.1\nHost: [::1]:9877", HTTPStatus.OK),
        ("GET / HTTP/1.0", HTTPStatus.OK),
    ],
)
def test_what_is_refused(server: HttpServer, request_text: str, status: HTTPStatus) -> None:
    assert ask(server, request_text)[0] == status
    assert ask(server, "GET / HTTP/1.1")[0] == HTTPStatus.OK


def test_a_slow_client_is_cut_off_and_delays_nobody(
    server: HttpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_server, "REQUEST_S", 0.3)
    with connect(server) as sends_slowly, connect(server) as reads_slowly:
        sends_slowly.sendall(b"GET / HT")
        reads_slowly.sendall(b"GET /large HTTP/1.1\r\n\r\n")
        assert ask(server, "GET / HTTP/1.1")[0] == HTTPStatus.OK
        assert eventually(lambda: is_cut_off(sends_slowly), 30)
        assert eventually(lambda: not server.connections, 30)


def test_of_too_many_connections_the_last_are_dropped(
    server: HttpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_server, "REQUEST_S", 600.0)  # it is not that which cuts them off
    waiting = [connect(server) for _ in range(MOST_CONNECTIONS)]
    try:
        # What came first is taken first: this one finds all places taken.
        with connect(server) as late:
            assert eventually(lambda: is_cut_off(late), 30)
    finally:
        for client in waiting:
            client.close()
    assert eventually(lambda: not server.connections, 30)
    assert ask(server, "GET / HTTP/1.1")[0] == HTTPStatus.OK


def test_a_port_that_is_taken_is_an_error(server: HttpServer) -> None:
    with pytest.raises(OSError, match="in use"):
        HttpServer("127.0.0.1", server.port, {})


def test_beyond_this_machine_any_name_is_served() -> None:
    server = HttpServer("0.0.0.0", 0, {"/": echo})
    try:
        assert ask(server, "GET / HTTP/1.1\nHost: host.example")[0] == HTTPStatus.OK
    finally:
        server.close()
