"""A system for tests of jobs: the coordinator's own `Jobs` on its own journal, behind a socket in a
thread; its model answers at once."""

import itertools
import threading
import time
from collections.abc import Callable
from typing import Any

import zmq

from pipemax.coordinator.events import Submitted
from pipemax.coordinator.jobs import JobLimits, Jobs
from pipemax.coordinator.jobs_round import JobMessage
from pipemax.coordinator.journal_file import journal_path
from pipemax.proto import PROTOCOL_VERSION
from pipemax.proto.errors import RequestError
from pipemax.proto.messages import ingest
from pipemax.proto.messages.registry import INGEST
from pipemax.proto.rundir import RunLock, create_run_dir, socket_endpoint
from pipemax.proto.sockets import make_router
from pipemax.proto.wire import Codec, encode
from support.batch_lines import answer
from support.fake_coordinator import status


class JobCoordinator:
    """From entry to exit the system `name` runs. `answer` says what becomes of a request; None
    keeps it unfinished. `deaf` swallows messages for which it says so. `secure` makes the socket
    one that listens on a free port of TCP."""

    def __init__(
        self,
        name: str = "default",
        *,
        answer: Callable[[ingest.Submit], Any] = answer,
        deaf: Callable[[object], bool] = lambda message: False,
        settings: str = "s",
        secure: Callable[["zmq.Socket[bytes]"], None] | None = None,
    ) -> None:
        self._secure = secure
        self._name = name
        self._answer = answer
        self._deaf = deaf
        self._settings = settings
        self.paused = False
        """Requests that are started stay unfinished."""
        self.received: list[object] = []
        self._stop = threading.Event()
        self._ready = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="job-coordinator")

    def __enter__(self) -> "JobCoordinator":
        run_dir = create_run_dir(self._name)
        self._lock = RunLock(run_dir)
        self.endpoint = socket_endpoint(run_dir, "ingest")
        self._thread.start()
        assert self._ready.wait(20)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._lock.release()
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        limits = JobLimits(most_running=64, most_waiting=64)
        jobs = Jobs(journal_path(self._name), self._settings, "fake", limits, self._accept)
        self._keys = itertools.count()
        self._running: dict[int, ingest.Submit] = {}
        try:
            jobs.open()
            with zmq.Context() as context, make_router(context, INGEST) as socket:
                if self._secure is not None:
                    self._secure(socket)
                    self.endpoint = "tcp://127.0.0.1:*"
                socket.bind(self.endpoint)
                self.endpoint = socket.getsockopt_string(zmq.LAST_ENDPOINT)
                self._ready.set()
                while not self._stop.is_set():
                    self._round(jobs, socket)
        except BaseException as error:
            self._failure = error
        finally:
            self._ready.set()
            jobs.close(clean=True)

    def _round(self, jobs: Jobs, socket: "zmq.Socket[bytes]") -> None:
        if socket.poll(0 if jobs.has_work else 20):
            peer, frame = socket.recv_multipart()
            message = Codec(INGEST, at_binder=True).decode(frame)
            self.received.append(message)
            match message:
                case _ if self._deaf(message):
                    pass
                case ingest.ClientHello():
                    hello = ingest.ServerHello(
                        protocol=PROTOCOL_VERSION,
                        instance_id="i",
                        model_name="fake",
                        max_model_len=512,
                        credits=64,
                    )
                    socket.send_multipart([peer, encode(hello)])
                case ingest.StatusQuery():
                    socket.send_multipart([peer, encode(status("i"))])
                case _ if isinstance(message, JobMessage):
                    jobs.receive(peer, message)
        answers, unwanted = jobs.write([])
        for peer, reply in answers:
            socket.send_multipart([peer, encode(reply)])
        while jobs.start() is not None:
            pass
        for key in unwanted:
            self._finish(jobs, key)
        if self.paused:
            time.sleep(0.001)
        else:
            for key in list(self._running):
                self._finish(jobs, key)

    def _accept(self, job: int, submit: ingest.Submit) -> Submitted:
        found = self._answer(submit)
        if isinstance(found, ingest.Refused):
            raise RequestError(found.code, found.message)
        key = next(self._keys)
        self._running[key] = submit
        return Submitted(key, (5,), submit.sampling, 0, -job)

    def _finish(self, jobs: Jobs, key: int) -> None:
        jobs.finished(key, self._answer(self._running.pop(key)))
