"""What one transaction does to the journal on behalf of `Jobs`: messages carried out, results
written, requests chosen to run. Nothing in memory changes here; that is done when it is written."""

from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from pipemax.coordinator.journal import Journal
from pipemax.coordinator.journal_rows import (
    DamagedError,
    JobRow,
    Outcome,
    ResultRow,
    unsealed,
)
from pipemax.proto.errors import RequestError
from pipemax.proto.messages import ingest
from pipemax.proto.messages.types import Message
from pipemax.proto.wire import encode

MOST_DEATHS = 5
"""A request that was running at so many deaths of the coordinator is failed."""
_FEWER_BITS = 3
"""For each death it was running at, a request runs beside 1/8 as many others: if it is the cause,
it is alone in the end, and no other is failed for it."""
_START_BATCH = 64
_START_BYTES = 4 * 2**20
"""Requests taken from the journal at a time."""
_JOBS_AT_ONCE = 16
"""Jobs that take turns, those that were there first; the next one follows when one of them has
nothing more to start. Output lengths are forecast by job, at a cost for each."""
_REMOVE_BATCH = 500

JobMessage = (
    ingest.OpenJob
    | ingest.AddRequests
    | ingest.CloseJob
    | ingest.ListJobs
    | ingest.FetchResults
    | ingest.CancelJob
    | ingest.DeleteJob
    | ingest.RetryJob
)
_BRINGS_WORK = ingest.OpenJob | ingest.AddRequests | ingest.RetryJob
Place = tuple[int, int]
"""A job's number and a request's seq."""

UNREADABLE = (DamagedError, msgspec.DecodeError, UnicodeDecodeError, TypeError)
"""What unsealing and decoding raise for what a damaged file may hold."""
DAMAGED = "damaged"
"""Code of what the journal does not give back."""
_RESULT = msgspec.msgpack.Decoder(ingest.Finished | ingest.Refused)


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What new jobs are noted with, and whether there may be any."""

    settings: str
    model_name: str
    draining: bool
    now: float
    """Unix time."""


@dataclass(slots=True)
class Queue:
    """Jobs that have, or may have, requests to start."""

    ready: deque[int] = field(default_factory=deque)
    """In order of their turns."""
    cursors: dict[int, int] = field(default_factory=dict)
    """Requests of lower seq were started. 0 for jobs that are not there."""

    def copy(self) -> "Queue":
        return Queue(deque(self.ready), dict(self.cursors))

    def without(self, jobs: Collection[int]) -> "Queue":
        return Queue(
            deque(job for job in self.ready if job not in jobs),
            {job: seq for job, seq in self.cursors.items() if job not in jobs},
        )


class Round:
    """Its methods are called within one transaction."""

    def __init__(self, journal: Journal, terms: Terms) -> None:
        self._journal = journal
        self._terms = terms
        self._grown: list[JobRow] = []
        """Jobs that may have got requests."""
        self.cancelled: list[int] = []
        self.deleted: list[int] = []
        self.removed: list[int] = []
        """Of which nothing is left to remove."""
        self.must_reach_disk = False
        self.chosen: list[tuple[Place, bytes]] = []
        self.failed: list[Place] = []
        """Given up as they were running at too many deaths."""

    # Messages

    def carry_out(self, message: JobMessage) -> Message:
        """Returns the answer."""
        try:
            if self._terms.draining and isinstance(message, _BRINGS_WORK):
                text = "the system is shutting down; jobs go on when it is started again"
                raise RequestError("draining", text)
            if isinstance(message, ingest.FetchResults):
                return self._page(message)
            rows = self._change(message)
        except RequestError as error:
            return refused(message, error.code, str(error))
        infos = tuple(row.info(self._terms.settings) for row in rows)
        return ingest.JobList(number=message.number, jobs=infos)

    def _change(self, message: JobMessage) -> Sequence[JobRow]:
        journal, terms = self._journal, self._terms
        match message:
            case ingest.OpenJob(job=name, about=about):
                return [journal.open_job(name, about, terms.model_name, terms.settings, terms.now)]
            case ingest.AddRequests(job=name, first_seq=first_seq, requests=requests):
                blobs = [(entry.note, encode(entry.request)) for entry in requests]
                self._grown.append(journal.add(name, first_seq, blobs))
                return self._grown[-1:]
            case ingest.RetryJob(job=name, retry=retry):
                self.must_reach_disk = True
                row = journal.retry_job(name, retry, terms.model_name, terms.settings, terms.now)
                self._grown.append(row)
                return [row]
            case ingest.CloseJob(job=name, num_requests=num_requests):
                self.must_reach_disk = True
                return [journal.close_job(name, num_requests, terms.now)]
            case ingest.ListJobs(job=None):
                return journal.jobs()
            case ingest.ListJobs(job=str(name)):
                return [journal.job(name)]
            case ingest.CancelJob(job=name):
                row = journal.cancel_job(name, terms.now)
                if row.state == "cancelled":
                    self.cancelled.append(row.job)
                return [row]
            case ingest.DeleteJob(job=name):
                deleted = journal.delete_job(name)
                if deleted is not None:
                    self.deleted.append(deleted)
                return []
        raise AssertionError(message)

    def _page(self, message: ingest.FetchResults) -> Message:
        row = self._journal.job(message.job)
        found = self._journal.results(row.job, message.position)
        return page_of(message.number, row.info(self._terms.settings), message.position, found)

    # Results and removal

    def write_results(self, outcomes: Iterable[Outcome], given_up: Iterable[Place]) -> None:
        self._journal.finish(outcomes, self._terms.now)
        self._journal.stop(given_up)

    def remove(self, jobs: Sequence[int]) -> None:
        """A little of the first one."""
        if jobs and self._journal.remove_some(jobs[0], _REMOVE_BATCH):
            self.removed.append(jobs[0])

    # What runs next

    def line_up(self, queue: Queue) -> None:
        """Jobs that got requests."""
        for row in self._grown:
            fits = row.settings == self._terms.settings and not row.is_over
            if fits and row.job not in queue.ready:
                queue.ready.append(row.job)

    def choose(
        self,
        queue: Queue,
        deaths: Mapping[Place, int],
        *,
        num_running: int,
        worst: int,
        most: int,
        room: int,
    ) -> None:
        """Takes requests that are to start, up to `room` of them, from jobs in turn, so that at
        most `most` run; fewer beside those that were running at deaths, `worst` being the most
        deaths of any that runs. Updates `queue`."""
        room = min(room, most - num_running, _START_BATCH)
        size_bytes = 0
        while queue.ready and room > len(self.chosen):
            job = queue.ready[0]
            in_turn = min(len(queue.ready), _JOBS_AT_ONCE)
            share = max(1, (room - len(self.chosen)) // in_turn)
            num_found = 0
            for seq, request in self._journal.pending(job, queue.cursors.get(job, 0), share):
                num_found += 1
                died = deaths.get((job, seq), 0)
                if died >= MOST_DEATHS:
                    self.failed.append((job, seq))
                else:
                    worst = max(worst, died)
                    if num_running + len(self.chosen) >= max(1, most >> (_FEWER_BITS * worst)):
                        return  # its turn comes when enough of the others are done
                    self.chosen.append(((job, seq), request))
                    size_bytes += len(request)
                queue.cursors[job] = seq + 1
                if size_bytes >= _START_BYTES:
                    return
            queue.ready.popleft()
            if num_found == share:
                queue.ready.insert(in_turn - 1, job)

    def mark(self) -> None:
        """Notes what was chosen, and fails what was not, for good."""
        self._journal.start((place for place, _ in self.chosen), self._terms.now)
        self._journal.finish(map(_killer, self.failed), self._terms.now)


def outcome_of(
    place: Place, result: ingest.Finished | ingest.Refused, *, can_be_retried: bool = True
) -> Outcome:
    """As it is written."""
    blob = encode(result)
    if isinstance(result, ingest.Refused):
        return Outcome(*place, blob, True, can_be_retried=can_be_retried)
    failed = result.finish_reason == "error"
    return Outcome(*place, blob, failed, result.num_prompt_tokens, result.num_output_tokens)


def page_of(
    number: int, job: ingest.JobInfo, position: int, rows: Iterable[ResultRow]
) -> ingest.JobResults:
    """Results as clients get them. In the place of one that cannot be read there is a refusal that
    says so: the others are none the worse for it."""
    return ingest.JobResults(
        number=number, job=job, position=position, results=tuple(map(_result_of, rows))
    )


def _result_of(row: ResultRow) -> ingest.JobResult:
    note = b""
    try:
        note = unsealed(row.note)
        result = _RESULT.decode(unsealed(row.result))
    except UNREADABLE:
        return damaged(row.position, row.seq, note)
    return ingest.JobResult(seq=row.seq, note=note, finished_at=row.finished_at, result=result)


def damaged(position: int, seq: int = 0, note: bytes = b"") -> ingest.JobResult:
    """What stands for a result that cannot be read, with what is known of it."""
    text = f"result {position} of the job could not be read: its journal is damaged there"
    refusal = ingest.Refused(request_id=f"position-{position}", code=DAMAGED, message=text)
    return ingest.JobResult(seq=seq, note=note, finished_at=0.0, result=refusal)


def refused(message: JobMessage, code: str, reason: str) -> ingest.JobRefused:
    return ingest.JobRefused(number=message.number, code=code, message=reason[:4096])


def without_journal(message: JobMessage, why: str) -> Message:
    """Answer of a system without a journal, which could not be made for the reason `why`."""
    match message:
        case ingest.ListJobs(job=None) | ingest.DeleteJob():
            return ingest.JobList(number=message.number, jobs=())
        case ingest.OpenJob():
            if why:
                return refused(message, "journal", why)
            return refused(message, "draining", "the system is shutting down and takes no jobs")
    return refused(message, "unknown_job", f"no job has the name {message.job!r}")


def _killer(place: Place) -> Outcome:
    text = (
        f"it was running at {MOST_DEATHS} deaths of the coordinator, at the last one alone: it may "
        "be their cause, and is not tried again"
    )
    return outcome_of(place, failure(f"request-{place[1]}", text, None))


def failure(request_id: str, error: str, code: str | None) -> ingest.Finished:
    """Of a request that did not get to run."""
    return ingest.Finished(
        request_id=request_id,
        token_ids=(),
        text="",
        finish_reason="error",
        num_prompt_tokens=0,
        queue_s=0.0,
        first_token_s=0.0,
        total_s=0.0,
        error=error,
        error_code=code,
    )
