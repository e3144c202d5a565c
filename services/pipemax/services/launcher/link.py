"""The launcher's connection to the coordinator: control messages, and status by the same socket
that clients use."""

import logging
import os
import time
import uuid
from pathlib import Path

import zmq

from pipemax.proto import PROTOCOL_VERSION
from pipemax.proto.errors import WireError
from pipemax.proto.messages import control, ingest
from pipemax.proto.messages.registry import CONTROL, INGEST, Channel
from pipemax.proto.messages.types import Message
from pipemax.proto.rundir import socket_endpoint
from pipemax.proto.sockets import connect_dealer, identity_of
from pipemax.proto.wire import Codec, encode, single_frame
from pipemax.services.launcher import events as on
from pipemax.services.launcher.supervisor import COORDINATOR

ASK_AGAIN_S = 1.0
"""Between two Hellos, whose answers also show that the coordinator works, and between two status
queries."""
OWN_GAP_S = 5.0
"""If this process itself did not look for so long, it was stopped, and the coordinator is not to
blame for the silence."""
STATUS_LOST_S = 10.0
"""A status query not answered in this time is sent again."""

log = logging.getLogger(__name__)


class CoordinatorLink:
    """Lives in one thread; never blocks but in `wait`."""

    def __init__(self, run_dir: Path, wake_fd: int, hung_after_s: float) -> None:
        """`hung_after_s`: a silence of the coordinator that is too long."""
        self._hung_after_s = hung_after_s
        self._looked_at = 0.0
        self._heard_at: float | None = None
        """None: the coordinator was not heard since it was started."""
        self.status: ingest.Status | None = None
        """The last one received."""
        self._context = zmq.Context[zmq.Socket[bytes]]()
        self._control = _Peer(self._context, run_dir, CONTROL, identity_of("launcher"))
        self._ingest = _Peer(self._context, run_dir, INGEST, None)
        self._poller = zmq.Poller()
        self._poller.register(self._control.socket, zmq.POLLIN)
        self._poller.register(self._ingest.socket, zmq.POLLIN)
        self._poller.register(wake_fd, zmq.POLLIN)
        self._hello = control.Hello(
            protocol=PROTOCOL_VERSION,
            role="launcher",
            pid=os.getpid(),
            incarnation=uuid.uuid4().hex,
        )
        self._welcomed = False
        self._hello_at = 0.0
        self._greeted_ingest = False
        self._query_sent_at: float | None = None
        self._query_next_at = 0.0

    def wait(self, timeout_s: float) -> None:
        """Until a message or the wake file descriptor is readable, or the time is over."""
        self._poller.poll(max(0, int(timeout_s * 1000)))

    def keep_in_touch(self, now: float, want_status: bool) -> None:
        """Says Hello; asks for the status about once a second if wanted."""
        if now >= self._hello_at:
            self._hello_at = now + ASK_AGAIN_S
            self._control.send(self._hello)
        lost = self._query_sent_at is not None and now >= self._query_sent_at + STATUS_LOST_S
        due = self._query_sent_at is None and now >= self._query_next_at
        if self._welcomed and want_status and (lost or due):
            if not self._greeted_ingest:
                self._greeted_ingest = True
                self._ingest.send(ingest.ClientHello(protocol=PROTOCOL_VERSION, client="launcher"))
            self._ingest.send(ingest.StatusQuery())
            self._query_sent_at = now
            self._query_next_at = now + ASK_AGAIN_S

    def forget(self) -> None:
        """The coordinator is started again and knows nothing of us."""
        self.status = None
        self._heard_at = None
        self._welcomed = self._greeted_ingest = False
        self._query_sent_at = None

    def silence(self, now: float) -> list[on.Event]:
        """Whether the coordinator, once it was heard, says nothing any more. To be called often;
        said once."""
        gap, self._looked_at = now - self._looked_at, now
        if self._heard_at is None:
            return []
        if gap > OWN_GAP_S:
            self._heard_at = now
        silent_s = now - self._heard_at
        if silent_s <= self._hung_after_s:
            return []
        self._heard_at = None
        return [on.Unresponsive(COORDINATOR, silent_s)]

    def send_drain(self) -> None:
        """Asks the coordinator to finish; what was known of its work before is out of date."""
        self.status = None
        self._control.send(control.Drain())

    def receive(self) -> list[on.Event]:
        """What the coordinator said since the last call."""
        events: list[on.Event] = []
        for message in self._control.receive():
            self._heard_at = time.monotonic()
            match message:
                case control.Welcome():
                    self._welcomed = True
                case control.Unresponsive(process=process, silent_s=silent_s):
                    events.append(on.Unresponsive(process, silent_s))
                case control.SystemReady():
                    events.append(on.SystemReady())
                case control.Drained():
                    events.append(on.Drained())
                case control.Stop():
                    events.append(on.StopRequested(drain=False))
        for message in self._ingest.receive():
            if isinstance(message, ingest.Status):
                self.status = message
                self._query_sent_at = None
                events.append(on.MissingReported(message.missing))
        return events

    def close(self) -> None:
        self._control.socket.close()
        self._ingest.socket.close()
        self._context.term()


class _Peer:
    """A DEALER with the decoder of its channel."""

    def __init__(
        self,
        context: "zmq.Context[zmq.Socket[bytes]]",
        run_dir: Path,
        channel: Channel,
        identity: bytes | None,
    ) -> None:
        self.socket = connect_dealer(
            context, socket_endpoint(run_dir, channel.name), channel, identity
        )
        self._channel = channel
        self._codec = Codec(channel, at_binder=False)

    def send(self, message: Message) -> None:
        """Queues the message; it goes out as soon as the coordinator is there to take it."""
        self.socket.send(encode(message), zmq.NOBLOCK)

    def receive(self) -> list[Message]:
        messages: list[Message] = []
        while True:
            try:
                frames = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return messages
            try:
                messages.append(self._codec.decode(single_frame(frames, self._channel)))
            except WireError as error:
                log.warning("unreadable message from the coordinator: %s", error)
