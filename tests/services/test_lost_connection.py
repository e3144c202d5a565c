"""A client over TCP whose connection breaks: to the coordinator it is another client then, and each
prompt still gets one completion."""

import functools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zmq

from pipemax.client import Client, Jobs, Submit, connection
from pipemax.proto.curve import make_key_pair
from pipemax.proto.errors import NotRunningError
from pipemax.proto.key_files import replace_file
from support.command import eventually
from support.fake_coordinator import FakeCoordinator, finished
from support.job_coordinator import JobCoordinator
from support.tcp import Line


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """A client's folder; `secret` beside it is the server's."""
    folder = tmp_path / "keys"
    folder.mkdir(mode=0o700)
    server, client = make_key_pair(), make_key_pair()
    replace_file(folder / "client.key", client.secret.encode())
    replace_file(folder / "server.pub", server.public.encode())
    replace_file(tmp_path / "secret", server.secret.encode())
    return folder


def secured(keys: Path) -> Callable[["zmq.Socket[bytes]"], None]:
    def secure(socket: "zmq.Socket[bytes]") -> None:
        socket.curve_server = True
        socket.curve_secretkey = (keys.parent / "secret").read_bytes()

    return secure


def test_what_was_unfinished_is_submitted_again(
    keys: Path, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "HEARTBEAT_S", 0.1)
    cuts = 3 * ["a"]

    def answer(submit: Submit) -> Any:
        return None if cuts and submit.prompt == cuts[-1] else finished(submit)

    with (
        FakeCoordinator(runtime_dir / "x", answer, secure=secured(keys)) as fake,
        Line(fake.endpoint) as line,
        Client(endpoint=line.endpoint, keys=keys) as client,
    ):

        def cut() -> None:
            for times in (1, 2, 3):
                assert eventually(functools.partial(was_asked, times), 20)
                cuts.pop()
                line.cut()

        def was_asked(times: int) -> bool:
            return [submit.prompt for submit in fake.submitted].count("a") >= times

        cutter = threading.Thread(target=cut)
        cutter.start()
        texts = [completion.text for completion in client.generate(["a", "b", "c"])]
        cutter.join()
    assert texts == ["A", "B", "C"]
    assert line.connections >= 4  # ZeroMQ makes some of its own


def test_a_system_that_does_not_come_back_ends_the_wait(keys: Path, runtime_dir: Path) -> None:
    with FakeCoordinator(runtime_dir / "x", lambda _: None, secure=secured(keys)) as fake:
        line = Line(fake.endpoint)
        with line:
            client = Client(endpoint=line.endpoint, keys=keys, timeout_s=1.0)
        with client, pytest.raises(NotRunningError, match="did not answer within 1 s"):
            client.generate("a")


def test_a_call_about_jobs_is_made_again(keys: Path) -> None:
    with (
        JobCoordinator(secure=secured(keys)) as system,
        Line(system.endpoint) as line,
        Jobs(endpoint=line.endpoint, keys=keys) as jobs,
    ):
        jobs.open("night")
        line.cut()
        assert jobs.info("night").state == "open"
        line.cut()
        assert [job.name for job in jobs.all()] == ["night"]
