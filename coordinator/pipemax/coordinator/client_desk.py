"""What clients say to the coordinator, and what they are answered at once.

What a client can cost the others is bounded in size (frames, queued messages, credits) and in time
(INGEST_SLICE_S), with two exceptions. A message of endless parts is kept by libzmq until its last
part or until the peer leaves: no socket option counts parts, and sockets without parts are not in
its stable interface. And one prompt is tokenised in one go, up to the text that `max_model_len`
tokens could spell. Who clients may be is `doors.py`'s.
"""

import logging
import time
from collections.abc import Callable

from pipemax.coordinator.doors import Doors
from pipemax.coordinator.events import Event
from pipemax.coordinator.jobs import Jobs
from pipemax.coordinator.jobs_round import JobMessage
from pipemax.coordinator.sessions import ClientId, Sessions
from pipemax.coordinator.span_watch import SpanWatch
from pipemax.proto import PROTOCOL_VERSION
from pipemax.proto.errors import RequestError, WireError
from pipemax.proto.messages import ingest, spans
from pipemax.proto.messages.registry import INGEST
from pipemax.proto.messages.types import Message
from pipemax.proto.wire import Codec, single_frame

INGEST_BATCH = 64
"""Client messages handled, at most, before control messages get their turn again."""
INGEST_SLICE_S = 0.002
"""CPU time after which they get it however few client messages were handled. Time that others had
the core does not count: they would take it from the clients alone, and steps come with few requests
when those are not heard. The pipeline waits for as long at worst, with every step while clients
submit."""

log = logging.getLogger(__name__)


class ClientDesk:
    def __init__(
        self,
        doors: Doors,
        hello: ingest.ServerHello,
        sessions: Sessions,
        jobs: Jobs,
        spans: SpanWatch,
        status: Callable[[], ingest.Status],
        tell: Callable[[Event], None],
        cancel: Callable[[int], None],
    ) -> None:
        """`tell` takes what the scheduling core is to know, `cancel` the key of a request that is
        not wanted any more."""
        self._doors = doors
        self._hello = hello
        self._sessions = sessions
        self._jobs = jobs
        self._spans = spans
        self._status = status
        self._tell = tell
        self._cancel = cancel
        self._codec = Codec(INGEST, at_binder=True)
        self.draining = False
        """No request is accepted any more."""

    def receive(self) -> bool:
        """Handle some client messages; returns whether there may be more."""
        until = time.thread_time() + INGEST_SLICE_S
        for _ in range(INGEST_BATCH):
            if time.thread_time() > until:
                break
            received = self._doors.receive()
            if received is None:
                return False
            client, frames = received
            try:
                self._on_client(client, self._codec.decode(single_frame(frames, INGEST)))
            except WireError as error:
                self.answer(client, refused(None, error.code, str(error)))
            if self._jobs.has_messages:
                break
        return True

    def _on_client(self, client: ClientId, message: Message) -> None:
        match message:
            case ingest.ClientHello(protocol=protocol):
                if protocol != PROTOCOL_VERSION:
                    text = f"this server speaks protocol {PROTOCOL_VERSION}, not {protocol}"
                    self.answer(client, refused(None, "protocol", text))
                else:
                    self.answer(client, self._hello)
            case ingest.Submit():
                self._on_submit(client, message)
            case ingest.Cancel(request_id=request_id):
                key = self._sessions.key_of(client, request_id)
                if key is None:
                    text = f"no unfinished request has the id {request_id!r}"
                    self.answer(client, refused(request_id, "unknown_id", text))
                else:
                    self._cancel(key)
            case ingest.PartialTaken(number=number):
                self._sessions.taken(client, number)
            case spans.WatchSpans(seconds=seconds):
                self._on_watch(client, seconds)
            case ingest.StatusQuery():
                self.answer(client, self._status())
            case _ if isinstance(message, JobMessage):
                self._jobs.receive(client, message)
            case _:
                raise WireError("unknown_type", f"{type(message).__name__} is not expected here")

    def _on_watch(self, client: ClientId, seconds: float) -> None:
        try:
            self._spans.watch(client, seconds, time.monotonic())
        except RequestError as error:
            self.answer(client, refused(None, error.code, str(error)))

    def _on_submit(self, client: ClientId, submit: ingest.Submit) -> None:
        try:
            if self.draining:
                raise RequestError("draining", "the system is shutting down and takes no requests")
            event = self._sessions.accept(client, submit, time.monotonic())
        except RequestError as error:
            self.answer(client, refused(submit.request_id, error.code, str(error)))
            return
        self._tell(event)

    def answer(self, client: ClientId, message: Message) -> None:
        """An immediate answer; a client that cannot take it loses it."""
        try:
            self._doors.send(client, message)
        except (BlockingIOError, ConnectionError) as error:
            log.debug("answer to a client is lost: %s", error)  # it must not fill our disk


def refused(request_id: str | None, code: str, message: str) -> ingest.Refused:
    return ingest.Refused(request_id=request_id, code=code, message=message[:4096])
