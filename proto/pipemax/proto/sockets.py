"""ZeroMQ sockets with the limits of the protocol already set."""

import zmq

from pipemax.proto.messages.registry import Channel

HANDSHAKE_TIMEOUT_MS = 3000
"""A connection that does not complete the ZeroMQ handshake in this time is closed."""
HEARTBEAT_MS = 5_000
GONE_AFTER_MS = 30_000
"""A network connection over which no answer to a heartbeat comes for so long is closed."""
QUEUE_MESSAGES = 10_000
"""Messages that wait in a socket for one peer, in each direction."""


def bind_router(
    context: zmq.Context[zmq.Socket[bytes]], endpoint: str, channel: Channel
) -> zmq.Socket[bytes]:
    """`make_router`, bound."""
    socket = make_router(context, channel)
    socket.bind(endpoint)
    return socket


def make_router(context: zmq.Context[zmq.Socket[bytes]], channel: Channel) -> zmq.Socket[bytes]:
    """A ROUTER that never drops silently: sending to an unknown or full peer raises ZMQError
    (EHOSTUNREACH, EAGAIN). A returning peer with the same identity takes its old place."""
    socket = context.socket(zmq.ROUTER)
    _limit(socket, channel)
    socket.setsockopt(zmq.RCVHWM, channel.binder_queue_messages)
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
    socket.setsockopt(zmq.BACKLOG, 1024)
    return socket


def connect_dealer(
    context: zmq.Context[zmq.Socket[bytes]],
    endpoint: str,
    channel: Channel,
    identity: bytes | None = None,
) -> zmq.Socket[bytes]:
    """`make_dealer`, connected."""
    socket = make_dealer(context, channel, identity)
    socket.connect(endpoint)
    return socket


def make_dealer(
    context: zmq.Context[zmq.Socket[bytes]], channel: Channel, identity: bytes | None = None
) -> zmq.Socket[bytes]:
    """A DEALER; `identity` is how the ROUTER addresses it (None: random, for clients)."""
    socket = context.socket(zmq.DEALER)
    _limit(socket, channel)
    if identity is not None:
        socket.setsockopt(zmq.IDENTITY, identity)
    socket.setsockopt(zmq.RECONNECT_IVL, 20)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, 500)
    return socket


def _limit(socket: zmq.Socket[bytes], channel: Channel) -> None:
    socket.setsockopt(zmq.MAXMSGSIZE, channel.max_message_bytes)
    socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_TIMEOUT_MS)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, QUEUE_MESSAGES)
    socket.setsockopt(zmq.RCVHWM, QUEUE_MESSAGES)


def beat(socket: zmq.Socket[bytes]) -> None:
    """Notices a peer beyond a network that is gone without a word. Before it is bound or connects.
    ZeroMQ's own threads beat, so that a process which only is busy does not count as gone."""
    socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, GONE_AFTER_MS)


def identity_of(role: str, index: int = 0) -> bytes:
    """Routing identity of a process of the system: `stage-0`, `sampler-0`, `kv_daemon`,
    `launcher`."""
    return f"{role}-{index}".encode() if role in ("stage", "sampler") else role.encode()


def region_identity(stage: int) -> bytes:
    """Of the socket on which a stage asks for its host region, from a thread of its own."""
    return f"region-{stage}".encode()
