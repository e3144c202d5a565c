"""The limits that the sockets themselves keep."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
import zmq

from pipemax.proto.messages.registry import CONTROL, INGEST, Channel
from pipemax.proto.rundir import socket_endpoint
from pipemax.proto.sockets import bind_router, connect_dealer, identity_of

Socket = zmq.Socket[bytes]
Bind = Callable[[Channel], Socket]
Connect = Callable[[Channel, bytes], Socket]

_SMALL = dataclasses.replace(INGEST, max_message_bytes=1000)
_WAIT_MS = 10_000


@pytest.fixture
def context() -> Iterator[zmq.Context[Socket]]:
    with zmq.Context() as context:
        yield context


@pytest.fixture
def bind(context: zmq.Context[Socket], runtime_dir: Path) -> Iterator[Bind]:
    with ExitStack() as stack:
        yield lambda channel: stack.enter_context(
            bind_router(context, socket_endpoint(runtime_dir, channel.name), channel)
        )


@pytest.fixture
def connect(context: zmq.Context[Socket], runtime_dir: Path) -> Iterator[Connect]:
    with ExitStack() as stack:
        yield lambda channel, identity: stack.enter_context(
            connect_dealer(context, socket_endpoint(runtime_dir, channel.name), channel, identity)
        )


def test_messages_travel_between_identities(bind: Bind, connect: Connect) -> None:
    peer = connect(CONTROL, identity_of("stage", 1))
    peer.send(b"before the binder exists")
    router = bind(CONTROL)
    assert router.poll(_WAIT_MS)
    assert router.recv_multipart() == [b"stage-1", b"before the binder exists"]
    router.send_multipart([b"stage-1", b"answer"])
    assert peer.poll(_WAIT_MS)
    assert peer.recv() == b"answer"


def test_identities() -> None:
    assert identity_of("stage", 0) == b"stage-0"
    assert identity_of("stage", 7) == b"stage-7"
    assert identity_of("kv_daemon") == b"kv_daemon"
    assert identity_of("launcher") == b"launcher"


def test_sending_to_nobody_is_an_error(bind: Bind) -> None:
    router = bind(CONTROL)
    with pytest.raises(zmq.ZMQError) as caught:
        router.send_multipart([b"stage-9", b"x"])
    assert caught.value.errno == zmq.EHOSTUNREACH


def test_a_message_above_the_limit_costs_only_its_sender(bind: Bind, connect: Connect) -> None:
    router = bind(_SMALL)
    other = connect(_SMALL, b"other")
    sender = connect(_SMALL, b"sender")
    sender.send(bytes(1000))
    assert router.poll(_WAIT_MS)
    assert router.recv_multipart() == [b"sender", bytes(1000)]
    with sender.get_monitor_socket(zmq.EVENT_DISCONNECTED) as monitor:
        sender.send(bytes(1001))
        assert monitor.poll(_WAIT_MS), "the binder did not close the connection"
        sender.disable_monitor()
    other.send(b"unaffected")
    assert router.poll(_WAIT_MS)
    assert router.recv_multipart() == [b"other", b"unaffected"]


def test_a_flood_waits_at_its_sender(bind: Bind, connect: Connect) -> None:
    """A binder that does not read holds a bounded number of messages."""
    router = bind(INGEST)
    sender = connect(INGEST, b"flood")
    # The sender's own queue would take thousands more; a small one shows where the binder stops.
    endpoint = sender.get_string(zmq.LAST_ENDPOINT)
    sender.disconnect(endpoint)
    sender.setsockopt(zmq.SNDHWM, 1)
    sender.connect(endpoint)
    sender.setsockopt(zmq.SNDTIMEO, 500)
    frame = bytes(1 << 20)
    sent = 0
    with suppress(zmq.Again):
        while sent < 10 * INGEST.binder_queue_messages:
            sender.send(frame)
            sent += 1
    assert sent <= 2 * INGEST.binder_queue_messages
    assert router.poll(_WAIT_MS)


def test_a_returning_peer_takes_its_old_place(bind: Bind, connect: Connect) -> None:
    """A restarted stage must not wait until it is noticed that the old one is gone."""
    router = bind(CONTROL)
    for incarnation in (b"first", b"second"):
        peer = connect(CONTROL, b"stage-0")
        peer.send(incarnation)
        assert router.poll(_WAIT_MS)
        assert router.recv_multipart() == [b"stage-0", incarnation]
    router.send_multipart([b"stage-0", b"to the second"])
    assert peer.poll(_WAIT_MS)
    assert peer.recv() == b"to the second"
