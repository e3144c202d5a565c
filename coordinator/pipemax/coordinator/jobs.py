"""Durable jobs: what clients ask about them, which of their requests run, what is written when.

Messages and results are collected and written once a poll round, in one transaction; whoever is
answered, is answered about what is written. A request is marked as started in the journal before it
is even tokenised, so that one which brings the coordinator down is known by its mark.

A job's requests wait in the journal, not in memory. So many are taken from there as could run at
once, from all jobs in turn: what connected clients submit waits behind those only.
"""

import logging
import sqlite3
import time
from collections import Counter, deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from msgspec.structs import replace

from pipemax.coordinator import journal_file
from pipemax.coordinator.events import Submitted
from pipemax.coordinator.jobs_round import (
    DAMAGED,
    UNREADABLE,
    JobMessage,
    Place,
    Queue,
    Round,
    Terms,
    failure,
    outcome_of,
    refused,
    without_journal,
)
from pipemax.coordinator.journal import Journal, JournalLimits
from pipemax.coordinator.journal_rows import Outcome, unsealed
from pipemax.proto.errors import ConfigError, RequestError
from pipemax.proto.messages import ingest
from pipemax.proto.messages.types import Message

log = logging.getLogger(__name__)

_RETRY_S = 1.0
"""After the journal could not be written."""

Answer = tuple[bytes, Message]
"""To which client, and what."""
Accept = Callable[[int, ingest.Submit], Submitted]
"""Checks a request of the job with this number. Raises RequestError."""

_REQUEST = msgspec.msgpack.Decoder(ingest.Submit | ingest.Refused)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobTotals:
    """Of all jobs together, for metrics."""

    jobs: Counter[str] = field(default_factory=Counter)
    """By state."""
    requests_pending: int = 0
    requests_finished: int = 0
    journal_bytes: int = 0
    unfinished: tuple[ingest.JobInfo, ...] = ()
    """Oldest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobLimits:
    most_running: int
    """Requests of all jobs in the scheduler."""
    most_waiting: int
    """Of these, requests that the scheduler has not begun to run."""
    journal: JournalLimits = field(default_factory=JournalLimits)


class Jobs:
    """A round is `write`, then `start` until there is nothing more to start. Without a journal file
    there are no jobs, and no file until one is opened."""

    def __init__(
        self, path: Path, settings: str, model_name: str, limits: JobLimits, accept: Accept
    ) -> None:
        """settings: what results depend on; jobs run in a system of the same settings only."""
        self._path = path
        self._settings = settings
        self._model_name = model_name
        self._limits = limits
        self._accept = accept
        self._journal: Journal | None = None
        self._messages: list[tuple[bytes, JobMessage]] = []
        self._outcomes: list[Outcome] = []
        self._given_up: list[Place] = []
        """Stopped without a result."""
        self._queue = Queue()
        self._removing: list[int] = []
        self._chosen: deque[tuple[Place, bytes]] = deque()
        """Marked as started, not yet in the scheduler."""
        self._running: dict[int, Place] = {}
        """In the scheduler, by key."""
        self._withdrawn: set[int] = set()
        """Keys of those whose results nobody wants."""
        self._deaths: dict[Place, int] = {}
        self._started_at: dict[Place, float] = {}
        """Unix time, of those that ran when an earlier coordinator died."""
        self._retry_at: float | None = None
        """When the journal is written again that could not be written."""
        self._draining = False
        self._changed = True
        self._totals = JobTotals()

    def open(self) -> None:
        """Takes up what an earlier coordinator left. Raises ConfigError when the journal cannot be
        used."""
        if not self._path.exists():
            return
        self._journal = journal = Journal(self._path, self._limits.journal)
        try:
            self._deaths = journal.deaths()
            self._started_at = journal.started_at()
            self._removing = journal.to_remove()
            unfinished = [job for job in journal.jobs() if not job.is_over]
        except sqlite3.Error as error:
            raise journal_file.refusal(self._path, error) from error
        for job in unfinished:
            if job.settings == self._settings:
                self._queue.ready.append(job.job)
            else:
                log.warning("job %s is held: it was submitted to other settings", job.name)
        log.info("journal %s: %d unfinished jobs", self._path, len(unfinished))

    def close(self, *, clean: bool) -> None:
        """clean: what runs was stopped on purpose; else it is noted as running at a death."""
        if self._journal is not None:
            self._journal.close(clean=clean)
            self._journal = None

    @property
    def is_idle(self) -> bool:
        """Nothing runs and nothing is left to be written. What cannot be written does not count:
        it will be run again."""
        unwritten = bool(self._outcomes) and self._retry_at is None
        return not self._running and not self._chosen and not unwritten

    @property
    def has_messages(self) -> bool:
        """Messages wait for `write`. They can be large: no more should be received before."""
        return bool(self._messages)

    @property
    def has_work(self) -> bool:
        """Another round at once would get on with something."""
        if self._journal is None or self._retry_at is not None:
            return False
        return bool(self._removing or self._chosen or self._outcomes)

    def totals(self) -> JobTotals:
        """Raises ConfigError as `write`."""
        if self._changed and self._journal is not None:
            self._changed = False
            try:
                rows, journal_bytes = self._journal.jobs(), self._journal.used_bytes
            except sqlite3.Error as error:
                raise journal_file.refusal(self._path, error) from error
            infos = [row.info(self._settings) for row in rows]
            self._totals = JobTotals(
                jobs=Counter(info.state for info in infos),
                requests_pending=sum(
                    row.num_requests - row.num_results for row in rows if not row.is_over
                ),
                requests_finished=sum(row.num_results for row in rows),
                journal_bytes=journal_bytes,
                unfinished=tuple(info for info in infos if info.ended_at is None),
            )
        return self._totals

    # What the shell tells

    def receive(self, client: bytes, message: JobMessage) -> None:
        """It is answered after the next `write`."""
        self._messages.append((client, message))

    def finished(self, key: int, result: ingest.Finished) -> None:
        """A request in the scheduler is done. Keys that are no job's are passed over."""
        place = self._running.pop(key, None)
        if place is None:
            return
        if key in self._withdrawn:
            self._withdrawn.discard(key)
            self._given_up.append(place)
        else:
            self._outcomes.append(outcome_of(place, result))

    def drain(self, waiting: Collection[int]) -> list[int]:
        """Starts nothing more. Returns keys to cancel: those of `waiting`, which the scheduler has
        not begun to run, go on at the system's next start."""
        self._draining = True
        self._give_up_chosen(lambda place: True)
        return self._withdraw(lambda key, place: key in waiting)

    # A round

    def write(
        self, waiting: Collection[int], *, may_start: bool = True
    ) -> tuple[list[Answer], list[int]]:
        """Writes what was collected and chooses what is to start. Returns answers to send and keys
        to cancel. `waiting`: keys of requests that the scheduler has not begun to run. may_start:
        the scheduler runs what it gets; requests that wait for the system to be complete are not
        to blame if it never is.

        Raises ConfigError when the journal turns out to be damaged.
        """
        messages, self._messages = self._messages, []
        if self._journal is None:
            why = self._create(messages) if messages else ""
            if self._journal is None:
                return [(client, without_journal(message, why)) for client, message in messages], []
        journal = self._journal
        may_start = may_start and bool(messages or self._queue.ready)
        room = self._room(waiting) if may_start else 0
        try:
            if self._retry_at is not None and time.monotonic() < self._retry_at:
                return self._only_read(journal, messages), []
            to_write = messages or self._outcomes or self._given_up or self._removing
            if to_write or (room and self._queue.ready):
                return self._write(journal, messages, room)
        except sqlite3.OperationalError as error:
            log.error("the journal %s cannot be written: %s", self._path, error)
            self._retry_at = time.monotonic() + _RETRY_S
            return self._only_read(journal, messages), []
        except sqlite3.DatabaseError as error:
            raise journal_file.refusal(self._path, error) from error
        return [], []

    def _only_read(
        self, journal: Journal, messages: list[tuple[bytes, JobMessage]]
    ) -> list[Answer]:
        """Answers while the journal cannot be written."""
        round_ = Round(journal, self._terms())
        text = f"the journal {self._path} cannot be written; make room and try again"
        return [
            (
                client,
                round_.carry_out(message)
                if isinstance(message, ingest.ListJobs | ingest.FetchResults)
                else refused(message, "journal", text),
            )
            for client, message in messages
        ]

    def _write(
        self, journal: Journal, messages: list[tuple[bytes, JobMessage]], room: int
    ) -> tuple[list[Answer], list[int]]:
        round_, queue = Round(journal, self._terms()), self._queue.copy()
        with journal.transaction():
            round_.write_results(self._outcomes, self._given_up)
            answers = [(client, round_.carry_out(message)) for client, message in messages]
            round_.line_up(queue)
            round_.remove(self._removing)
            if room:
                self._choose(round_, queue, room)
        unwanted = self._written(round_, queue)
        self._retry_at = None
        if round_.must_reach_disk:
            try:
                journal.sync()
            except sqlite3.OperationalError as error:
                log.error("the journal %s cannot be synced: %s", self._path, error)
                answers = self._only_read(journal, messages)
        return answers, unwanted

    def _choose(self, round_: Round, queue: Queue, room: int) -> None:
        worst = 0
        if self._deaths:
            worst = max((self._deaths.get(place, 0) for place in self._running.values()), default=0)
        round_.choose(
            queue,
            self._deaths,
            num_running=len(self._running),
            worst=worst,
            most=self._limits.most_running,
            room=room,
        )
        round_.mark()

    def _written(self, round_: Round, queue: Queue) -> list[int]:
        """Takes over what is in the journal now. Returns keys to cancel."""
        for place in (*((o.job, o.seq) for o in self._outcomes), *round_.failed):
            self._deaths.pop(place, None)
            self._started_at.pop(place, None)
        self._outcomes.clear()
        self._given_up.clear()
        self._chosen.extend(round_.chosen)
        over = {*round_.cancelled, *round_.deleted}
        self._removing += [job for job in over if job not in self._removing]
        self._removing = [job for job in self._removing if job not in round_.removed]
        self._changed = True
        self._queue = queue.without(over) if over else queue
        if not over:
            return []
        self._give_up_chosen(lambda place: place[0] in over)
        return self._withdraw(lambda key, place: place[0] in over)

    def start(self) -> Submitted | None:
        """The next request for the scheduler; None when all that were chosen are on their way."""
        while self._chosen:
            place, blob = self._chosen.popleft()
            result: ingest.Finished | ingest.Refused
            can_be_retried = False
            try:
                request = _REQUEST.decode(unsealed(blob))
                if isinstance(request, ingest.Refused):
                    result = request
                else:
                    can_be_retried = True
                    event = self._accept(place[0], self._in_time(place, request))
                    self._running[event.key] = place
                    return event
            except TimeoutError as error:
                result = failure(request.request_id or "", str(error), "timeout")
            except RequestError as error:
                result = _refusal(request, error.code, str(error))
            except UNREADABLE as error:
                result = _refusal(None, DAMAGED, f"the journal's copy is not readable: {error}")
            outcome = outcome_of(place, result, can_be_retried=can_be_retried)
            self._outcomes.append(outcome)
        return None

    def _in_time(self, place: Place, request: ingest.Submit) -> ingest.Submit:
        """The time it may take runs since its first start, also if the coordinator died since.
        Raises TimeoutError when it is over."""
        since = self._started_at.get(place)
        if request.timeout_s is None or since is None:
            return request
        left_s = request.timeout_s - max(0.0, time.time() - since)
        if left_s <= 0:
            raise TimeoutError(
                f"it was not finished within the {request.timeout_s:g} s it was given: the "
                "coordinator died meanwhile"
            )
        return replace(request, timeout_s=left_s)

    def _terms(self) -> Terms:
        return Terms(
            settings=self._settings,
            model_name=self._model_name,
            draining=self._draining,
            now=time.time(),
        )

    def _room(self, waiting: Collection[int]) -> int:
        """Requests that may be chosen now."""
        places = self._limits.most_running - len(self._running)
        if self._draining or self._chosen or places <= 0:
            return 0
        # There may be many more of either: connected clients' wait among them.
        few, many = sorted((self._running.keys(), waiting), key=len)
        ours = sum(map(many.__contains__, few))
        return max(0, min(self._limits.most_waiting - ours, places))

    def _create(self, messages: list[tuple[bytes, JobMessage]]) -> str:
        """Makes the journal for the first job. Returns why not, if it cannot be made."""
        if self._draining or not any(isinstance(m, ingest.OpenJob) for _, m in messages):
            return ""
        try:
            self._journal = Journal(self._path, self._limits.journal)
        except ConfigError as error:
            log.error("%s", error)
            return str(error)
        return ""

    def _give_up_chosen(self, is_unwanted: Callable[[Place], bool]) -> None:
        self._given_up += [place for place, _ in self._chosen if is_unwanted(place)]
        self._chosen = deque(entry for entry in self._chosen if not is_unwanted(entry[0]))

    def _withdraw(self, is_unwanted: Callable[[int, Place], bool]) -> list[int]:
        keys = [
            key
            for key, place in self._running.items()
            if key not in self._withdrawn and is_unwanted(key, place)
        ]
        self._withdrawn.update(keys)
        return keys


def _refusal(
    request: ingest.Submit | ingest.Refused | None, code: str, text: str
) -> ingest.Refused:
    request_id = None if request is None else request.request_id
    return ingest.Refused(request_id=request_id, code=code, message=text[:4096])
