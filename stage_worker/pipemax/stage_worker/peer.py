"""A socket to one of the processes that bind, and what a process says before it ends by an error.
Imports no torch."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

import zmq

from pipemax.proto.errors import ConfigError, ModelError
from pipemax.proto.messages.control import Failure
from pipemax.proto.messages.registry import Channel
from pipemax.proto.messages.types import Message
from pipemax.proto.rundir import socket_endpoint
from pipemax.proto.sockets import connect_dealer
from pipemax.proto.wire import Codec, encode, single_frame

Context = zmq.Context[zmq.Socket[bytes]]
FAILURE_LINGER_MS = 500
"""How long last words may take to reach the coordinator."""

log = logging.getLogger(__name__)


class WorkFailedError(Exception):
    """A step could not be computed, or not sampled. Not a PipemaxError: a fresh process may do
    better, so the launcher is to start one."""


class Peer:
    """A DEALER to one of the processes that bind. `identity`: whom it is from."""

    def __init__(self, context: Context, run_dir: Path, channel: Channel, identity: bytes) -> None:
        endpoint = socket_endpoint(run_dir, channel.name)
        self.socket = connect_dealer(context, endpoint, channel, identity)
        self._channel = channel
        self._codec = Codec(channel, at_binder=False)

    def send(self, message: Message) -> None:
        """Never blocks. A peer that has taken nothing for ten thousand messages is gone; whoever
        replaces it resets us, so that the message is void anyway."""
        try:
            self.socket.send(encode(message), zmq.DONTWAIT)
        except zmq.Again:
            log.warning("%s takes no messages; dropped one", self._channel.name)

    def receive(self) -> Message | None:
        """The next message that has arrived. Raises WireError."""
        try:
            frames = self.socket.recv_multipart(zmq.DONTWAIT)
        except zmq.Again:
            return None
        return self._codec.decode(single_frame(frames, self._channel))


@contextlib.contextmanager
def last_words(control: Peer, *fatal: type[Exception]) -> Iterator[None]:
    """Tells the coordinator why this process ends when it ends by an exception. Errors that no
    restart would mend, `fatal` ones among them, leave as they are; others as WorkFailedError."""
    try:
        yield
    except Exception as error:
        line = " ".join(f"{type(error).__name__}: {error}".split())
        control.socket.setsockopt(zmq.LINGER, FAILURE_LINGER_MS)
        control.send(Failure(error=line[:4000]))
        if isinstance(error, (ConfigError, ModelError, *fatal)):
            raise
        raise WorkFailedError(line) from error
