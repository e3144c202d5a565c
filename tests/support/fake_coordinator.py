"""A coordinator for tests: a thread with the `ingest` ROUTER that answers as it is told."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import zmq

from pipemax.proto import PROTOCOL_VERSION
from pipemax.proto.messages.ingest import (
    Cancel,
    ClientHello,
    Finished,
    PartialTaken,
    Refused,
    ServerHello,
    Status,
    StatusQuery,
    Submit,
)
from pipemax.proto.messages.registry import INGEST
from pipemax.proto.messages.types import Message
from pipemax.proto.sockets import make_router
from pipemax.proto.wire import Codec, encode

Answer = Callable[[Submit], Message | list[Any] | None]
"""A list is sent message by message; the last one is the result."""


def finished(submit: Submit, **changes: Any) -> Finished:
    """What a system whose model says one token per prompt token would answer."""
    ids = submit.prompt_token_ids or tuple(range(len(submit.prompt or "chat")))
    result = Finished(
        request_id=submit.request_id,
        token_ids=ids,
        text=(submit.prompt or "").upper(),
        finish_reason="length",
        num_prompt_tokens=len(ids),
        queue_s=0.1,
        first_token_s=0.2,
        total_s=0.3,
    )
    return msgspec.structs.replace(result, **changes)


def status(instance_id: str) -> Status:
    counts: dict[str, Any] = {
        field.name: 0
        for field in msgspec.structs.fields(Status)
        if field.required and field.name not in ("instance_id", "phase", "model_name")
    }
    counts.update(missing=(), stages=())
    return Status(instance_id=instance_id, phase="ready", model_name="fake", **counts)


class FakeCoordinator:
    """Answers on `ipc://<path>` from entry to exit. `answer` says what becomes of a request; None
    keeps it unfinished. With `batch` n, answers are held back until n are due and then sent last
    first."""

    def __init__(
        self,
        path: Path,
        answer: Answer = finished,
        *,
        credits: int = 100,
        batch: int = 1,
        protocol: int = PROTOCOL_VERSION,
        instance_id: str = "first",
        silent: bool = False,
        refuse_hello: str | None = None,
        secure: Callable[["zmq.Socket[bytes]"], None] | None = None,
    ) -> None:
        """secure: makes the socket one that listens on a free port of TCP."""
        self.endpoint = f"ipc://{path}"
        self._secure = secure
        self.submitted: list[Submit] = []
        self.cancelled: list[str] = []
        self.taken: list[int] = []
        """Partials."""
        self.hellos = 0
        self.most_unfinished = 0
        self.silent = silent
        self._answer = answer
        self._hello = ServerHello(
            protocol=protocol,
            instance_id=instance_id,
            model_name="fake",
            max_model_len=512,
            credits=credits,
        )
        self._refuse_hello = refuse_hello
        self._batch = batch
        self._held: list[tuple[bytes, Message]] = []
        self._unfinished: set[tuple[bytes, str]] = set()
        self._known: set[bytes] = set()
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fake-coordinator")

    def __enter__(self) -> "FakeCoordinator":
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        codec = Codec(INGEST, at_binder=True)
        try:
            with zmq.Context() as context, make_router(context, INGEST) as socket:
                if self._secure is not None:
                    self._secure(socket)
                    self.endpoint = "tcp://127.0.0.1:*"
                socket.bind(self.endpoint)
                self.endpoint = socket.getsockopt_string(zmq.LAST_ENDPOINT)
                self._ready.set()
                while not self._stop.is_set():
                    if not socket.poll(20):
                        continue
                    peer, frame = socket.recv_multipart()
                    if self.silent:
                        continue
                    for receiver, message in self._handle(peer, codec.decode(frame)):
                        try:
                            socket.send_multipart([receiver, encode(message)])
                        except zmq.ZMQError as error:
                            assert error.errno == zmq.EHOSTUNREACH, error
        except BaseException as error:
            self._failure = error
            self._ready.set()

    def _handle(self, peer: bytes, message: Message) -> list[tuple[bytes, Message]]:
        match message:
            case ClientHello():
                self.hellos += 1
                if self._refuse_hello is not None:
                    text = "we speak another protocol"
                    return [(peer, Refused(request_id=None, code=self._refuse_hello, message=text))]
                self._known.add(peer)
                return [(peer, self._hello)]
            case _ if peer not in self._known:
                text = "say client_hello first"
                return [(peer, Refused(request_id=None, code="hello", message=text))]
            case StatusQuery():
                return [(peer, status(self._hello.instance_id))]
            case Cancel(request_id=request_id):
                self.cancelled.append(request_id)
                if (peer, request_id) not in self._unfinished:
                    return []
                self._unfinished.discard((peer, request_id))
                result = finished(Submit(request_id=request_id, prompt="cut"))
                return [(peer, msgspec.structs.replace(result, finish_reason="abort"))]
            case PartialTaken(number=number):
                self.taken.append(number)
                return []
            case Submit():
                return self._submit(peer, message)
        raise AssertionError(message)

    def _submit(self, peer: bytes, submit: Submit) -> list[tuple[bytes, Message]]:
        self.submitted.append(submit)
        key = (peer, submit.request_id)
        assert key not in self._unfinished, "a client may not use an id twice at once"
        self._unfinished.add(key)
        self.most_unfinished = max(self.most_unfinished, len(self._unfinished))
        answer = self._answer(submit)
        if answer is None:
            return []
        if isinstance(answer, list):
            self._unfinished.discard(key)
            return [(peer, message) for message in answer]
        self._held.append((peer, answer))
        if len(self._held) < self._batch:
            return []
        held, self._held = self._held[::-1], []
        for receiver, message in held:
            assert isinstance(message, Finished | Refused)
            self._unfinished.discard((receiver, str(message.request_id)))
        return held
