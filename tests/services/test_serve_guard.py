"""Who may use the server, and how much of it at once."""

import json
import logging
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from pipemax.client import ChoiceDelta, Submit, connection
from pipemax.proto.errors import ConfigError
from pipemax.proto.messages.ingest import Partial, RequestDelta
from pipemax.services.serve import completions
from pipemax.services.serve.keys import ApiKeys, read_keys
from pipemax.services.serve.settings import ServeSettings, is_loopback
from support.fake_coordinator import FakeCoordinator
from support.http_server import HttpServer

from .test_serve_completions import CHAT, CHAT_PATH, answer, error_of, raw

KEY = "a-key-of-many-characters"
OTHER = "another-key-of-many-characters"


def test_keys(runtime_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    settings = ServeSettings(keys=ApiKeys([OTHER, KEY]))
    with (
        FakeCoordinator(runtime_dir / "i", answer) as fake,
        HttpServer(endpoint=fake.endpoint, settings=settings) as server,
    ):
        for wrong in ("", "Bearer", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", f"Basic {KEY}", KEY):
            found = raw(server, "GET", "/v1/models", Authorization=wrong)
            assert found[0] == 401, wrong
            assert error_of(found)["code"] == "invalid_api_key"
            assert found[1]["www-authenticate"] == "Bearer"
        assert raw(server, "POST", "/v1/nothing", {})[0] == 401
        for right in (f"Bearer {KEY}", f"bearer  {OTHER}"):
            assert raw(server, "GET", "/v1/models", Authorization=right)[0] == 200
        # A browser's page of another site has no key; with one, it may be anywhere.
        elsewhere = {"Host": "models.example", "Origin": "https://example.com"}
        headers = {"Authorization": f"Bearer {KEY}", **elsewhere}
        assert raw(server, "GET", "/v1/models", **headers)[0] == 200
        assert raw(server, "GET", "/health")[0] == 200
        assert b"pipemax_http" in raw(server, "GET", "/metrics")[2]
    assert KEY not in caplog.text
    assert OTHER not in caplog.text
    assert KEY not in repr(settings)


def test_without_a_key_other_sites_are_refused(runtime_dir: Path) -> None:
    with (
        FakeCoordinator(runtime_dir / "i", answer) as fake,
        HttpServer(endpoint=fake.endpoint) as server,
    ):
        for host in ("localhost", "localhost:8000", "127.0.0.1", "127.3.2.1:80", "[::1]:80"):
            assert raw(server, "GET", "/v1/models", Host=host)[0] == 200, host
        for host in ("evil.example", "10.0.0.1", "", "localhost.evil.example", "[::1"):
            found = raw(server, "GET", "/v1/models", Host=host)
            assert (found[0], error_of(found)["code"]) == (403, "host"), host
        assert raw(server, "GET", "/v1/models", Origin="http://localhost:3000")[0] == 200
        for origin in ("https://evil.example", "null"):
            found = raw(server, "GET", "/v1/models", Origin=origin)
            assert (found[0], error_of(found)["code"]) == (403, "origin")


def test_too_many_at_once(runtime_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEARTBEAT_S", 0.1)
    settings = ServeSettings(max_concurrent_requests=2)
    with (
        FakeCoordinator(runtime_dir / "i", answer) as fake,
        HttpServer(endpoint=fake.endpoint, settings=settings, timeout_s=0.5) as server,
    ):
        body = {"model": "fake", "prompt": "wait"}
        found: list[Any] = []
        threads = [
            threading.Thread(
                target=lambda: found.append(raw(server, "POST", "/v1/completions", body))
            )
            for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 30
        while len(fake.submitted) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        refused = raw(server, "POST", CHAT_PATH, {"model": "fake", "messages": CHAT})
        assert (refused[0], refused[1]["retry-after"]) == (429, "1")
        assert "limit" in error_of(refused)["message"]
        assert raw(server, "GET", "/health")[0] == 200
        assert b"requests_in_progress 2.0" in raw(server, "GET", "/metrics")[2]
        fake.silent = True  # the system is gone: those that wait are told so
        for thread in threads:
            thread.join()
    assert [status for status, _, _ in found] == [503, 503]


def test_a_body_that_does_not_come(runtime_dir: Path) -> None:
    with (
        FakeCoordinator(runtime_dir / "i", answer) as fake,
        HttpServer(endpoint=fake.endpoint, settings=ServeSettings(body_timeout_s=0.2)) as server,
        socket.create_connection(("127.0.0.1", server.port), timeout=60) as slow,
    ):
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n"
        slow.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n{")
        received = b""
        while piece := slow.recv(4096):  # until the server closes the connection
            received += piece
    assert received.startswith(b"HTTP/1.1 408 ")
    assert b'"timeout"' in received


def test_a_reader_that_takes_nothing(runtime_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is given up, with its request, and what it was to read never grew beyond the answer."""
    monkeypatch.setattr(completions, "_SEND_TIMEOUT_S", 0.3)
    text = "x" * 60_000

    def endless(submit: Submit) -> Any:
        deltas = [ChoiceDelta(index=0, token_ids=(n,), text=text) for n in range(200)]
        return [
            *(
                Partial(
                    number=number,
                    requests=(RequestDelta(request_id=submit.request_id, choices=(delta,)),),
                )
                for number, delta in enumerate(deltas, 1)
            ),
        ]

    with (
        FakeCoordinator(runtime_dir / "i", endless) as fake,
        HttpServer(endpoint=fake.endpoint) as server,
        socket.create_connection(("127.0.0.1", server.port), timeout=60) as slow,
    ):
        body = b'{"model": "fake", "prompt": "a", "stream": true}'
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n"
        slow.sendall((head % len(body)).encode())
        slow.sendall(b"Content-Type: application/json\r\n\r\n" + body)
        deadline = time.monotonic() + 30
        while not fake.cancelled:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert fake.taken == list(range(1, 201)), "the system need not wait for it"


def test_without_a_system(runtime_dir: Path) -> None:
    with HttpServer(name="nobody", wait_for_system=False) as server:
        deadline = time.monotonic() + 30
        while "not running" not in (
            text := json.loads(raw(server, "GET", "/health")[2])["error"]["message"]
        ):
            assert time.monotonic() < deadline, text
            time.sleep(0.01)
        found = raw(server, "POST", CHAT_PATH, {"model": "fake", "messages": CHAT})
        assert (found[0], found[1]["retry-after"]) == (503, "1")
        assert "pipemax up" in error_of(found)["message"]
        assert raw(server, "GET", "/v1/models")[0] == 503
        assert b"system_connected 0.0" in raw(server, "GET", "/metrics")[2]


def test_key_files(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"# two\n{KEY}\n\n{OTHER}\n")
    path.chmod(0o600)
    keys = read_keys(path, {"PIPEMAX_API_KEY": "not this one, as there is a file"})
    assert keys.admit(f"Bearer {KEY}")
    assert keys.admit(f"Bearer {OTHER}")
    assert not keys.admit("Bearer # two")
    path.chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        read_keys(path, {})
    path.chmod(0o600)
    for text, why in (("", "no key"), ("short\n", "16 ASCII"), ("a b" * 9, "no space")):
        path.write_text(text)
        with pytest.raises(ConfigError, match=why) as caught:
            read_keys(path, {})
        assert not text or text.strip() not in str(caught.value)
    with pytest.raises(ConfigError, match="No such file"):
        read_keys(tmp_path / "none", {})


def test_a_key_from_the_environment() -> None:
    assert read_keys(None, {"PIPEMAX_API_KEY": KEY}).admit(f"Bearer {KEY}")
    assert not read_keys(None, {})
    with pytest.raises(ConfigError, match="PIPEMAX_API_KEY"):
        read_keys(None, {"PIPEMAX_API_KEY": ""})


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.1.5", False),
        ("localhost.example", False),
        ("", False),
    ],
)
def test_only_loopback_without_a_key(host: str, expected: bool) -> None:
    assert is_loopback(host) == expected
    if expected:
        ServeSettings(host=host).check()
    else:
        with pytest.raises(ConfigError, match="--insecure-no-api-key"):
            ServeSettings(host=host).check()
        ServeSettings(host=host, insecure=True).check()
        ServeSettings(host=host, keys=ApiKeys([KEY])).check()


@pytest.mark.parametrize(
    ("field", "value", "why"),
    [
        ("port", 70000, "--port 70000"),
        ("max_body_bytes", 2**30, "15MiB"),
        ("max_body_bytes", 10, "1KiB"),
        ("max_file_bytes", 10, "--max-file-size"),
        ("max_concurrent_requests", 0, "at least 1"),
    ],
)
def test_settings_that_cannot_work(field: str, value: int, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        ServeSettings(**{field: value}).check()  # type: ignore[arg-type]
