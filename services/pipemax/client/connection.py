"""One connection to a coordinator's ingest socket: the greeting, liveness, messages both ways."""

import re
import time
from pathlib import Path

import zmq

from pipemax.client.handshake import Handshake
from pipemax.proto import PROTOCOL_VERSION
from pipemax.proto.curve import use_keys
from pipemax.proto.errors import ConfigError, NotRunningError, RequestError, WireError
from pipemax.proto.key_files import load_client
from pipemax.proto.messages.ingest import ClientHello, Refused, ServerHello, StatusQuery, Submit
from pipemax.proto.messages.registry import INGEST
from pipemax.proto.messages.types import Message
from pipemax.proto.rundir import TCP_PATTERN, launcher_pid, run_dir_of, socket_endpoint
from pipemax.proto.sockets import beat, make_dealer
from pipemax.proto.wire import Codec, encode, single_frame

HEARTBEAT_S = 2.0
"""Silence after which the coordinator is asked for its status: the answer shows that it lives,
and which instance it is."""
_LAUNCHER_CHECK_S = 0.5
_HELLO_AGAIN_S = 1.0
_CLOSE_LINGER_MS = 200


class Connection:
    """A DEALER on `ingest`.

    `name` finds the system by its run directory, whose lock then also tells when it has ended;
    `endpoint` is a socket given outright, over TCP only with the folder `keys`. `timeout_s` is how
    long nobody may answer.
    """

    def __init__(
        self, name: str, endpoint: str | None, keys: Path | None, timeout_s: float, label: str
    ) -> None:
        _check_endpoint(endpoint, keys)
        self._keys_dir = keys
        self._keys = None if keys is None else load_client(keys)
        self._handshake: Handshake | None = None
        self._run_dir: Path | None = run_dir_of(name) if endpoint is None else None
        self._endpoint = endpoint or socket_endpoint(run_dir_of(name), INGEST.name)
        self._system = f"system {name!r}" if endpoint is None else f"system at {endpoint}"
        self._timeout_s = timeout_s
        self._label = label
        self._codec = Codec(INGEST, at_binder=False)
        self._checker = Codec(INGEST, at_binder=True)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        self._socket: zmq.Socket[bytes] | None = None
        self._heard_at = time.monotonic()
        self._asked_at: float | None = None
        """When a heartbeat was sent that nothing has followed yet."""
        self._launcher_seen_at = 0.0

    def open(self) -> ServerHello:
        """Connects, anew if need be, and exchanges greetings. A new connection is a new client to
        the coordinator: whatever the old one had submitted must be submitted again.

        Raises NotRunningError when nobody answers and WireError when versions do not match.
        """
        self.close()
        self._check_launcher(now=True)
        if self._context.closed:
            raise ConfigError("this client is closed; make a new one")
        self._connect()
        deadline = time.monotonic() + self._timeout_s
        while (left := deadline - time.monotonic()) > 0:
            self.send(ClientHello(protocol=PROTOCOL_VERSION, client=self._label))
            answer = self._wait(min(_HELLO_AGAIN_S, left))
            if isinstance(answer, ServerHello):
                return self._checked(answer)
            if isinstance(answer, Refused):
                raise WireError(answer.code, f"{self._system} refused us: {answer.message}")
        raise NotRunningError(
            f"{self._system} did not answer within {self._timeout_s:g} s; "
            "see `pipemax status` and the logs in its run directory"
        )

    def _connect(self) -> None:
        self._socket = socket = make_dealer(self._context, INGEST)
        if self._keys is not None and self._keys_dir is not None:
            use_keys(socket, self._keys.own, self._keys.server_public)
            socket.setsockopt(zmq.IPV6, "[" in self._endpoint)
            beat(socket)
            self._handshake = Handshake(socket, self._system, self._keys_dir)
        socket.connect(self._endpoint)

    @property
    def was_lost(self) -> bool:
        """The connection broke: whatever was submitted must be submitted again, after `open`."""
        return self._handshake is not None and self._handshake.was_lost

    def _checked(self, hello: ServerHello) -> ServerHello:
        if hello.protocol != PROTOCOL_VERSION:
            raise WireError(
                "protocol",
                f"{self._system} speaks protocol {hello.protocol}, this client "
                f"{PROTOCOL_VERSION}; use the same version of PipeMax on both sides",
            )
        return hello

    def send(self, message: Message) -> None:
        """Queues a message. Raises NotRunningError when the queue stays full for `timeout_s`."""
        self._send_frame(encode(message))

    def send_request(self, submit: Submit) -> None:
        """Queues a request. Raises RequestError as `check_request`, before anything is sent."""
        self._send_frame(self._checked_frame(submit))

    def check_request(self, submit: Submit) -> int:
        """Its size in bytes. Raises RequestError for a request that the coordinator could not even
        read: a message it refuses does not say which request it was."""
        return len(self._checked_frame(submit))

    def _checked_frame(self, submit: Submit) -> bytes:
        try:
            frame = encode(submit)
            self._checker.decode(frame)
        except WireError as error:
            raise RequestError(error.code, str(error)) from error
        except (TypeError, ValueError, OverflowError) as error:  # not encodable
            raise RequestError("invalid_field", str(error)) from error
        return frame

    def _send_frame(self, frame: bytes) -> None:
        socket = self._open_socket()
        deadline = time.monotonic() + self._timeout_s
        while True:
            try:
                socket.send(frame, zmq.NOBLOCK)
            except zmq.Again:
                if time.monotonic() > deadline:
                    raise self._silent() from None
                self._check_launcher()
                socket.poll(100, zmq.POLLOUT)
            else:
                return

    def receive(self, timeout_s: float) -> Message | None:
        """The next message, None when none came in time. Asks for a sign of life when it has been
        quiet; raises NotRunningError when there is none for `timeout_s`, or when the launcher is
        gone."""
        deadline = time.monotonic() + timeout_s
        while True:
            left = deadline - time.monotonic()
            message = self._wait(max(0.0, min(left, _LAUNCHER_CHECK_S)))
            if message is not None:
                return message
            self._check_launcher()
            self._ask_if_quiet()
            if self.was_lost or time.monotonic() >= deadline:
                return None

    def wait(self, timeout_s: float, or_readable: int) -> None:
        """Returns when a message is there, a file descriptor can be read, or time is up."""
        poller = zmq.Poller()
        poller.register(self._open_socket(), zmq.POLLIN)
        poller.register(or_readable, zmq.POLLIN)
        poller.poll(int(timeout_s * 1000))

    def _ask_if_quiet(self) -> None:
        now = time.monotonic()
        if self._asked_at is None:
            if now - self._heard_at >= HEARTBEAT_S:
                self._asked_at = now
                self.send(StatusQuery())
        elif now - self._asked_at >= self._timeout_s:
            raise self._silent()

    def _wait(self, timeout_s: float) -> Message | None:
        """The next message if it comes in time, whatever the liveness."""
        socket = self._open_socket()
        if not socket.poll(int(timeout_s * 1000), zmq.POLLIN):
            if self._handshake is not None:
                self._handshake.check()
            return None
        message = self._codec.decode(single_frame(socket.recv_multipart(), INGEST))
        self._heard_at = time.monotonic()
        self._asked_at = None
        return message

    def _check_launcher(self, *, now: bool = False) -> None:
        if self._run_dir is None:
            return
        clock = time.monotonic()
        if not now and clock - self._launcher_seen_at < _LAUNCHER_CHECK_S:
            return
        if launcher_pid(self._run_dir) is None:
            word = "is not running" if now else "has ended"
            raise NotRunningError(
                f"{self._system} {word}; start it with `pipemax up --name {self._run_dir.name}`"
            )
        self._launcher_seen_at = clock

    def _silent(self) -> NotRunningError:
        return NotRunningError(
            f"{self._system} has not answered for {self._timeout_s:g} s; "
            "see `pipemax status` and the logs in its run directory"
        )

    def _open_socket(self) -> "zmq.Socket[bytes]":
        if self._socket is None:
            raise ConfigError("this client is closed; make a new one")
        return self._socket

    def close(self) -> None:
        """Closes the connection; safe to call twice."""
        if self._handshake is not None:
            self._handshake.close()
            self._handshake = None
        if self._socket is not None:
            self._socket.close(linger=_CLOSE_LINGER_MS)
            self._socket = None
        self._asked_at = None
        self._heard_at = time.monotonic()

    def terminate(self) -> None:
        """Closes for good."""
        self.close()
        self._context.term()


def _check_endpoint(endpoint: str | None, keys: Path | None) -> None:
    """Raises ConfigError: ipc has no keys, TCP goes by keys only."""
    if endpoint is None or endpoint.startswith("ipc://"):
        if keys is not None:
            raise ConfigError(f"keys {keys} go with an endpoint tcp://HOST:PORT")
    elif not re.fullmatch(TCP_PATTERN, endpoint):
        raise ConfigError(f"endpoint {endpoint!r:.200}: write tcp://HOST:PORT or ipc://PATH")
    elif keys is None:
        raise ConfigError(
            f"{endpoint} without keys: plain TCP is refused; give the key folder that `pipemax "
            "keys add` made for this machine"
        )
