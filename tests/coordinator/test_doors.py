"""The ingest socket over TCP: who is let in, what others cost, and that doors are kept apart."""

import json
import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import zmq

from pipemax.client import Client
from pipemax.coordinator.doors import Doors
from pipemax.coordinator.shell import CoordinatorShell
from pipemax.coordinator.text.processor import TextProcessor
from pipemax.proto.config import EngineConfig
from pipemax.proto.curve import KeyPair, make_key_pair, use_keys
from pipemax.proto.errors import ConfigError, NotRunningError
from pipemax.proto.messages.ingest import StatusQuery
from pipemax.proto.messages.registry import INGEST
from pipemax.proto.rundir import INGEST_ENDPOINT_FILE
from pipemax.proto.sockets import make_dealer
from pipemax.proto.wire import encode
from pipemax.services import keys
from support.tcp import command_header, connect, greeted, is_dropped

GROWTH_BYTES = 60 * 2**20


class Serving:
    """A coordinator in a thread that listens on TCP; no stages."""

    def __init__(self, folder: Path) -> None:
        run_dir, self.keys = folder / "run", folder / "keys"
        run_dir.mkdir()
        (run_dir / "config.json").write_text(json.dumps({"vocab_size": 100, "eos_token_id": 2}))
        keys.create(self.keys)
        config = EngineConfig(
            model=str(run_dir),
            served_model_name="m",
            layer_split=(1,),
            max_model_len=50,
            listen="tcp://127.0.0.1:0",
            keys_dir=str(self.keys),
        )
        shell = CoordinatorShell(config, run_dir, TextProcessor(run_dir))
        self._shell = shell
        self._thread = threading.Thread(target=shell.run)
        self._thread.start()
        told = run_dir / INGEST_ENDPOINT_FILE
        while not told.exists():
            assert self._thread.is_alive()
            time.sleep(0.01)
        self.endpoint = told.read_text()

    def client(self, folder: Path, timeout_s: float = 20.0) -> Client:
        return Client(endpoint=self.endpoint, keys=folder, timeout_s=timeout_s)

    def close(self) -> None:
        self._shell.stop()
        self._thread.join()


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Serving]:
    running = Serving(tmp_path)
    yield running
    running.close()


def test_listed_keys_are_let_in_and_a_removed_one_no_more(serving: Serving) -> None:
    laptop, desk = keys.add(serving.keys, "laptop"), keys.add(serving.keys, "desk")
    with serving.client(laptop) as client:
        assert client.status().model_name == "m"
        keys.remove(serving.keys, "desk")
        with pytest.raises(ConfigError, match="no key folder"):  # went with it
            serving.client(desk)
        assert client.status().phase == "starting"
    copied = serving.keys.parent / "copy"
    laptop.rename(copied)
    keys.remove(serving.keys, "laptop")
    with pytest.raises(NotRunningError, match="does not admit the key"):
        serving.client(copied)


def test_an_unlisted_key_and_the_key_of_another_system_are_named_at_once(
    serving: Serving, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    keys.create(other)
    stranger = keys.add(other, "laptop")
    with pytest.raises(NotRunningError, match=r"server\.pub is the key of another system"):
        serving.client(stranger, timeout_s=60.0)
    (stranger / "server.pub").write_bytes((serving.keys / "server.pub").read_bytes())
    with pytest.raises(NotRunningError, match="does not admit the key"):
        serving.client(stranger, timeout_s=60.0)


def test_a_peer_without_keys_is_not_heard(serving: Serving) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = make_dealer(context, INGEST)
    socket.connect(serving.endpoint)
    socket.send(encode(StatusQuery()))
    assert not socket.poll(500)
    context.destroy(linger=0)


def test_a_message_may_be_as_large_as_without_encryption(serving: Serving) -> None:
    """Larger ones end the connection; the largest a client may send is no such one."""
    folder = keys.add(serving.keys, "a")
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = make_dealer(context, INGEST)
    own = KeyPair(
        (serving.keys / "clients" / "a.pub").read_text().strip(),
        (folder / "client.key").read_text().strip(),
    )
    use_keys(socket, own, (folder / "server.pub").read_text().strip())
    socket.connect(serving.endpoint)
    for size in (INGEST.max_message_bytes, INGEST.max_message_bytes - 1):
        socket.send(b"\xc1" * size)
        assert socket.poll(20_000), "the connection was closed"
        assert b"not_msgpack" in socket.recv()
    context.destroy(linger=0)


def test_peers_that_finish_no_handshake_cost_neither_memory_nor_others(serving: Serving) -> None:
    process = psutil.Process(os.getpid())
    with serving.client(keys.add(serving.keys, "a")) as client:
        assert client.status()
        before = process.memory_info().rss
        held = [connect(serving.endpoint) for _ in range(300)]
        held += [greeted(serving.endpoint) for _ in range(100)]
        for seed in range(40):
            with connect(serving.endpoint) as peer:
                peer.sendall(random.Random(seed).randbytes(3000))
        for size in (2**24, 2**33):  # a handshake command is announced, and never comes whole
            peer = greeted(serving.endpoint)
            peer.sendall(command_header(size) + b"\x05HELLO" + b"x" * 1000)
            held.append(peer)
        assert client.status()
        assert process.memory_info().rss - before < GROWTH_BYTES
        assert all(is_dropped(peer) for peer in held)
        for peer in held:
            peer.close()
        assert client.status()
        assert process.memory_info().rss - before < GROWTH_BYTES


def test_clients_of_two_doors_with_one_identity_are_two(tmp_path: Path) -> None:
    folder, keys_dir = tmp_path, tmp_path / "k"
    keys.create(keys_dir)
    issued = keys.add(keys_dir, "a")
    config = EngineConfig(
        model="m",
        served_model_name="m",
        layer_split=(1,),
        max_model_len=50,
        listen="tcp://127.0.0.1:0",
        keys_dir=str(keys_dir),
    )
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    doors = Doors(context, config, folder)
    doors.open()
    near, far = make_dealer(context, INGEST, b"same"), make_dealer(context, INGEST, b"same")
    pair = KeyPair(
        (keys_dir / "clients" / "a.pub").read_text().strip(),
        (issued / "client.key").read_text().strip(),
    )
    use_keys(far, pair, (keys_dir / "server.pub").read_text().strip())
    near.connect(f"ipc://{folder}/ingest.sock")
    far.connect((folder / INGEST_ENDPOINT_FILE).read_text())
    try:
        near.send(b"near")
        far.send(b"far")
        whose: dict[bytes, bytes] = {}
        deadline = time.monotonic() + 20
        while len(whose) < 2:
            assert time.monotonic() < deadline
            if received := doors.receive():
                client, (frame,) = received
                whose[frame] = client
        assert whose[b"near"] != whose[b"far"]
        doors.send(whose[b"far"], StatusQuery())
        assert far.poll(20_000)
        assert far.recv() == encode(StatusQuery())
        assert not near.poll(0)
        with pytest.raises(ConnectionError):
            doors.send(b"lnobody", StatusQuery())
        assert doors.receive() is None
    finally:
        doors.close()
        context.destroy(linger=0)


@pytest.mark.parametrize("listen", ["tcp://203.0.113.1:0", "tcp://nowhere.invalid:5700"])
def test_an_address_that_is_not_ours_is_named(tmp_path: Path, listen: str) -> None:
    keys.create(tmp_path / "k")
    config = EngineConfig(
        model="m",
        served_model_name="m",
        layer_split=(1,),
        max_model_len=50,
        listen=listen,
        keys_dir=str(tmp_path / "k"),
    )
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    doors = Doors(context, config, tmp_path)
    try:
        with pytest.raises(ConfigError, match=f"cannot listen on {listen}"):
            doors.open()
    finally:
        doors.close()
        context.destroy(linger=0)


def test_keys_do_not_show_in_what_is_printed() -> None:
    pair = make_key_pair()
    assert pair.secret not in repr(pair)
