"""Durable jobs from Python: kept by the system, they outlive this process and the system's own."""

import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from pipemax.client.connection import Connection
from pipemax.proto.errors import RequestError, WireError
from pipemax.proto.messages.ingest import (
    AddRequests,
    CancelJob,
    CloseJob,
    DeleteJob,
    FetchResults,
    JobInfo,
    JobList,
    JobRefused,
    JobRequest,
    JobResults,
    ListJobs,
    OpenJob,
    Refused,
    RetryJob,
    Submit,
)

_ASK_AGAIN_S = 2.0
"""A message that was not answered in this time is sent again: the coordinator may be a new one."""

_Call = (
    OpenJob | AddRequests | CloseJob | ListJobs | FetchResults | CancelJob | DeleteJob | RetryJob
)


class Jobs:
    """The jobs of a running system, found as `Client` finds it.

    Calls return when what they ask for is kept, also when the coordinator dies meanwhile and is
    started again. They raise RequestError, with the code of the message `job_refused`, when it
    cannot be, and NotRunningError and WireError as `Client`. Not for use by several threads at
    once.
    """

    def __init__(
        self,
        name: str = "default",
        *,
        endpoint: str | None = None,
        keys: Path | str | None = None,
        timeout_s: float = 30.0,
        label: str = "jobs",
    ) -> None:
        self._connection = Connection(
            name, endpoint, None if keys is None else Path(keys), timeout_s, label
        )
        self._numbers = itertools.count()
        try:
            self._server = self._connection.open()
        except BaseException:
            self._connection.terminate()
            raise

    def __enter__(self) -> "Jobs":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Disconnects; safe to call twice. Jobs go on."""
        self._connection.terminate()

    @property
    def model_name(self) -> str:
        """Name under which the system serves its model."""
        return self._server.model_name

    def open(self, job: str, about: bytes = b"") -> JobInfo:
        """Makes a job, or finds the one that was opened with the same name and `about`."""
        return self._one(OpenJob(number=next(self._numbers), job=job, about=about))

    def check(self, submit: Submit) -> int:
        """Raises RequestError for a request that the system could not even read; one like it would
        have all be refused that are added with it. Returns its size in bytes."""
        return self._connection.check_request(submit)

    def add(self, job: str, first_seq: int, requests: Sequence[JobRequest]) -> JobInfo:
        """Adds requests behind the first `first_seq`. Those that are there already are passed
        over, so that what was interrupted can be done again."""
        number = next(self._numbers)
        return self._one(
            AddRequests(number=number, job=job, first_seq=first_seq, requests=tuple(requests))
        )

    def close_job(self, job: str, num_requests: int) -> JobInfo:
        """The job has all its requests, so many; they are on the disk when this returns."""
        number = next(self._numbers)
        return self._one(CloseJob(number=number, job=job, num_requests=num_requests))

    def all(self) -> tuple[JobInfo, ...]:
        """Oldest first."""
        return self._list(ListJobs(number=next(self._numbers)))

    def info(self, job: str) -> JobInfo:
        return self._one(ListJobs(number=next(self._numbers), job=job))

    def results(self, job: str, position: int = 0) -> JobResults:
        """The next results from a position on, in the order in which they were finished; none when
        there are no more by now."""
        message = FetchResults(number=next(self._numbers), job=job, position=position)
        answer = self._ask(message)
        if not isinstance(answer, JobResults):
            raise WireError("protocol", f"fetch_results was answered by {type(answer).__name__}")
        return answer

    def cancel(self, job: str) -> JobInfo:
        """Gives up the job's unfinished requests; results that are there stay."""
        return self._one(CancelJob(number=next(self._numbers), job=job))

    def delete(self, job: str) -> None:
        """Forgets a job that is finished or cancelled, and its results."""
        self._list(DeleteJob(number=next(self._numbers), job=job))

    def retry(self, job: str, retry: str) -> JobInfo:
        """Makes a job named `retry` of the requests of `job`, finished or cancelled, that failed,
        or goes on with that; results of `job` stay as they are. Requests that were none to begin
        with are not among them."""
        while True:
            made = self._one(RetryJob(number=next(self._numbers), job=job, retry=retry))
            if made.state != "open":
                return made

    def _one(self, message: _Call) -> JobInfo:
        (info,) = self._list(message)
        return info

    def _list(self, message: _Call) -> tuple[JobInfo, ...]:
        answer = self._ask(message)
        if not isinstance(answer, JobList):
            raise WireError("protocol", f"a call was answered by {type(answer).__name__}")
        return answer.jobs

    def _ask(self, message: _Call) -> JobList | JobResults:
        """Says it until it is answered."""
        while True:
            if self._connection.was_lost:
                self._server = self._connection.open()
            self._connection.send(message)
            ask_again_at = time.monotonic() + _ASK_AGAIN_S
            while not self._connection.was_lost:
                left_s = ask_again_at - time.monotonic()
                if left_s <= 0:
                    break
                answer = self._connection.receive(left_s)
                match answer:
                    case JobRefused(number=message.number, code=code, message=text):
                        raise RequestError(code, text)
                    case JobList(number=message.number) | JobResults(number=message.number):
                        return answer
                    case Refused(request_id=None, code=code, message=text):
                        raise WireError(code, f"the system refused a message: {text}")
                    case _:
                        pass  # a sign of life, or the second answer to what was said twice
