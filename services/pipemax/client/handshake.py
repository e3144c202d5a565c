"""What becomes of a connection over TCP: ZeroMQ tries again without a word, so its events are
watched for what no trying again will mend, and for connections that broke."""

from pathlib import Path

import zmq
from zmq.utils.monitor import parse_monitor_message

from pipemax.proto.errors import NotRunningError

_FAILURES = 5
"""Handshakes that end without a reason, one after the other: one may be due to a system that is
just leaving."""
_EVENTS = (
    zmq.Event.HANDSHAKE_SUCCEEDED
    | zmq.Event.HANDSHAKE_FAILED_AUTH
    | zmq.Event.HANDSHAKE_FAILED_PROTOCOL
    | zmq.Event.HANDSHAKE_FAILED_NO_DETAIL
    | zmq.Event.DISCONNECTED
)


class Handshake:
    """Watches one socket from before it connects."""

    def __init__(self, socket: "zmq.Socket[bytes]", system: str, keys: Path) -> None:
        """`system` and `keys` are for messages: who is to be reached, with the keys of which
        folder."""
        self._watched = socket
        self._events: zmq.Socket[bytes] = socket.get_monitor_socket(_EVENTS)
        self._system = system
        self._keys = keys
        self._failures = 0
        self._shaken = False
        self.was_lost = False
        """A connection that stood has broken. ZeroMQ makes another, and to the coordinator that is
        another client."""

    def check(self) -> None:
        """Takes in what happened. Raises NotRunningError when this system will not have us."""
        while self._events.poll(0):
            self._take(parse_monitor_message(self._events.recv_multipart())["event"])

    def _take(self, event: int) -> None:
        match event:
            case zmq.Event.HANDSHAKE_SUCCEEDED:
                self._shaken, self._failures = True, 0
            case zmq.Event.HANDSHAKE_FAILED_AUTH:
                raise NotRunningError(
                    f"{self._system} does not admit the key {self._keys / 'client.key'}: its "
                    "public key must be a file in `clients` of the system's key folder; see "
                    "`pipemax keys list` there"
                )
            case zmq.Event.HANDSHAKE_FAILED_PROTOCOL:
                raise NotRunningError(
                    f"{self._system} does not speak ZeroMQ with CURVE: is it what `pipemax up "
                    "--listen` printed?"
                )
            case zmq.Event.HANDSHAKE_FAILED_NO_DETAIL:
                self._failures += 1
                if self._failures >= _FAILURES:
                    raise NotRunningError(
                        f"{self._system} breaks every handshake off: "
                        f"{self._keys / 'server.pub'} is the key of another system, or something "
                        "else listens there"
                    )
            case zmq.Event.DISCONNECTED:
                self.was_lost = self.was_lost or self._shaken
            case _:
                pass

    def close(self) -> None:
        """Before the socket is closed."""
        self._watched.disable_monitor()
        self._events.close(linger=0)
