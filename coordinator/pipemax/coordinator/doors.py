"""The ingest sockets: one for clients of the same user on this machine, and, where asked for, one
over TCP for holders of admitted keys. A client is known by its door and its identity there."""

from collections import deque
from pathlib import Path
from typing import Final

import zmq

from pipemax.proto.config import EngineConfig
from pipemax.proto.curve import Gate
from pipemax.proto.errors import ConfigError
from pipemax.proto.key_files import AllowedClients, load_server, replace_file
from pipemax.proto.messages.registry import INGEST
from pipemax.proto.messages.types import Message
from pipemax.proto.rundir import INGEST_ENDPOINT_FILE, socket_endpoint
from pipemax.proto.sockets import beat, make_router
from pipemax.proto.wire import encode

ANSWERS_QUEUED = 1000
"""Answers that wait in the socket for one client; further results wait in its session."""
LOCAL: Final = b"l"
REMOTE: Final = b"r"
_ZAP_DOMAIN = "pipemax-ingest"

_AT_ONCE = int(zmq.NOBLOCK)

Socket = zmq.Socket[bytes]


class Doors:
    """Raises ConfigError when a socket cannot be opened."""

    def __init__(self, context: "zmq.Context[Socket]", config: EngineConfig, run_dir: Path) -> None:
        """Opens the local one."""
        self._context = context
        self._config = config
        self._run_dir = run_dir
        self._gate: Gate | None = None
        local = self._router()
        local.bind(socket_endpoint(run_dir, INGEST.name))
        self._sockets: dict[bytes, Socket] = {LOCAL: local}
        self._turns = deque(self._sockets)

    def open(self) -> None:
        """Opens the one over TCP, if it is configured. Close afterwards, whatever happens."""
        listen, keys_dir = self._config.listen, self._config.keys_dir
        if listen is None or keys_dir is None:
            return
        folder = Path(keys_dir)
        own = load_server(folder)
        remote = self._sockets[REMOTE] = self._router()
        self._turns.append(REMOTE)
        self._gate = Gate(self._context, _ZAP_DOMAIN, AllowedClients(folder).admits)
        self._gate.guard(remote, own)
        remote.setsockopt(zmq.IPV6, "[" in listen)
        beat(remote)
        told = self._run_dir / INGEST_ENDPOINT_FILE
        try:
            # One that is started again listens where clients look for it, also by a free port.
            remote.bind(told.read_text() if told.exists() else listen)
        except zmq.ZMQError as error:
            raise ConfigError(
                f"cannot listen on {listen} ({error}): --listen takes an address of this machine "
                "and a free port, such as tcp://0.0.0.0:5700"
            ) from error
        replace_file(told, remote.getsockopt_string(zmq.LAST_ENDPOINT).encode())

    def _router(self) -> Socket:
        socket = make_router(self._context, INGEST)
        socket.setsockopt(zmq.ROUTER_HANDOVER, 0)  # no client may take another's place
        socket.setsockopt(zmq.SNDHWM, ANSWERS_QUEUED)
        return socket

    def register(self, poller: zmq.Poller) -> None:
        for socket in self._sockets.values():
            poller.register(socket, zmq.POLLIN)

    def receive(self) -> tuple[bytes, list[bytes]] | None:
        """The next message and whose it is, from both doors in turn; None when there is none."""
        for _ in range(len(self._turns)):
            door = self._turns[0]
            self._turns.rotate(-1)
            try:
                identity, *frames = self._sockets[door].recv_multipart(_AT_ONCE)
            except zmq.Again:
                continue
            return door + identity, frames
        return None

    def send(self, client: bytes, message: Message) -> None:
        """Raises BlockingIOError when the client's queue is full, ConnectionError when it is
        gone."""
        try:
            self._sockets[client[:1]].send_multipart((client[1:], encode(message)), zmq.NOBLOCK)
        except zmq.Again as error:
            raise BlockingIOError(str(error)) from error
        except zmq.ZMQError as error:
            raise ConnectionError(str(error)) from error

    def close(self) -> None:
        """Nobody is let in any more. The sockets go with their context."""
        if self._gate is not None:
            self._gate.close()
            self._gate = None
