"""The journal: jobs, their requests and their results, in SQLite.

A request is in `requests` until it has its result, and then in `results`: one transaction moves it,
so that it has exactly one whatever dies when. Results have positions in the order in which they
came, without gaps; who has read up to a position can go on from it.

Written are messages as they came over the wire. Nothing here knows of sockets or of scheduling.
Methods that change something are called inside `transaction`; they raise RequestError, with the
codes of the message JobRefused, before they change anything, and sqlite3.Error when the file cannot
be read or written.
"""

import contextlib
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipemax.coordinator import journal_file
from pipemax.proto.errors import RequestError
from pipemax.proto.messages.ingest import JobInfo, JobState

MAX_JOBS = 1000
MAX_JOURNAL_BYTES = 256 * 2**30
PAGE_RESULTS = 256
PAGE_BYTES = 2**18
"""Results are read until they are so many or so large, but at least one."""

_JOB_FIELDS = (
    "job, name, state, about, model_name, settings, created_at, ended_at, num_requests, "
    "num_results, num_failed, prompt_tokens, output_tokens"
)


@dataclass(frozen=True, slots=True)
class JobRow:
    """A job as the journal has it."""

    job: int
    name: str
    state: str
    """`open`, `closed` or `cancelled`."""
    about: bytes
    model_name: str
    settings: str
    created_at: float
    ended_at: float | None
    num_requests: int
    num_results: int
    num_failed: int
    prompt_tokens: int
    output_tokens: int

    @property
    def is_over(self) -> bool:
        """It gets no more results."""
        finished = self.state == "closed" and self.num_results == self.num_requests
        return finished or self.state == "cancelled"

    def info(self, settings: str) -> JobInfo:
        """As clients see it; `settings` are the system's."""
        state: JobState = "running"
        if self.is_over:
            state = "cancelled" if self.state == "cancelled" else "finished"
        elif self.settings != settings:
            state = "held"
        elif self.state == "open":
            state = "open"
        return JobInfo(
            name=self.name,
            state=state,
            about=self.about,
            model_name=self.model_name,
            created_at=self.created_at,
            ended_at=self.ended_at if self.is_over else None,
            num_requests=self.num_requests,
            num_results=self.num_results,
            num_failed=self.num_failed,
            prompt_tokens=self.prompt_tokens,
            output_tokens=self.output_tokens,
        )


@dataclass(frozen=True, slots=True)
class Outcome:
    """A request's result, to be written."""

    job: int
    seq: int
    result: bytes
    failed: bool
    prompt_tokens: int = 0
    output_tokens: int = 0


@dataclass(frozen=True, slots=True)
class ResultRow:
    position: int
    seq: int
    note: bytes
    finished_at: float
    result: bytes


class Journal:
    """One process has it open. Raises ConfigError as `journal_file.open_existing`."""

    def __init__(self, path: Path) -> None:
        """Opens it, or makes a new one. Requests that ran when it was last open, and whose
        coordinator did not say otherwise, were running at its death."""
        self.path = path
        self._db = journal_file.open_existing(path) if path.exists() else journal_file.create(path)
        try:
            self._db.execute("UPDATE started SET deaths = deaths + 1, running = 0 WHERE running")
            (self._page_bytes,) = self._db.execute("PRAGMA page_size").fetchone()
        except sqlite3.Error as error:
            self._db.close()
            raise journal_file.refusal(path, error) from error

    def close(self, *, clean: bool) -> None:
        """clean: what runs was stopped on purpose."""
        if clean:
            with contextlib.suppress(sqlite3.Error):  # else it counts as one death, of several
                self._db.execute("UPDATE started SET running = 0")
        self._db.close()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """All of what is changed in the block is kept, or nothing."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:  # SQLite ends it itself when the disk is full
                self._db.execute("ROLLBACK")
            raise

    def sync(self) -> None:
        """Returns once everything is on the disk."""
        self._db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()

    @property
    def used_bytes(self) -> int:
        """What jobs take of the file."""
        (pages,) = self._db.execute("PRAGMA page_count").fetchone()
        (free,) = self._db.execute("PRAGMA freelist_count").fetchone()
        return int((pages - free) * self._page_bytes)

    # Jobs

    def jobs(self) -> list[JobRow]:
        """Oldest first."""
        return read_jobs(self._db)

    def job(self, name: str) -> JobRow:
        """Raises RequestError when there is none of that name."""
        found = self.find(name)
        if found is None:
            raise RequestError("unknown_job", f"no job has the name {name!r}")
        return found

    def find(self, name: str) -> JobRow | None:
        row = self._db.execute(f"SELECT {_JOB_FIELDS} FROM jobs WHERE name = ?", (name,)).fetchone()
        return None if row is None else JobRow(*row)

    def open_job(
        self, name: str, about: bytes, model_name: str, settings: str, now: float
    ) -> JobRow:
        """The job of that name, made if there is none. `now` is Unix time."""
        found = self.find(name)
        if found is not None:
            if found.about != about or found.model_name != model_name:
                raise RequestError(
                    "other_job",
                    f"a job named {name!r} was opened for something else; use another name, or "
                    "delete that one first",
                )
            return found
        (count,) = self._db.execute("SELECT COUNT(*) FROM jobs").fetchone()
        if count >= MAX_JOBS:
            raise RequestError(
                "too_many_jobs", f"the journal holds {MAX_JOBS} jobs; delete some that are finished"
            )
        self._check_room(len(about))
        self._db.execute(
            "INSERT INTO jobs (name, state, about, model_name, settings, created_at) "
            "VALUES (?, 'open', ?, ?, ?, ?)",
            (name, about, model_name, settings, now),
        )
        return self.job(name)

    def add(self, name: str, first_seq: int, requests: Sequence[tuple[bytes, bytes]]) -> JobRow:
        """`requests` are notes and requests. Those the job has already are passed over."""
        job = self.job(name)
        if first_seq > job.num_requests:
            raise RequestError(
                "gap",
                f"job {name!r} has {job.num_requests} requests; the next one is "
                f"{job.num_requests}, not {first_seq}",
            )
        new = requests[job.num_requests - first_seq :]
        if not new:
            return job
        if job.state != "open":
            raise RequestError("closed", f"job {name!r} is {job.state} and takes no requests")
        self._check_room(sum(len(note) + len(request) for note, request in new))
        self._db.executemany(
            "INSERT INTO requests VALUES (?, ?, ?, ?)",
            [(job.job, seq, *entry) for seq, entry in enumerate(new, job.num_requests)],
        )
        self._db.execute(
            "UPDATE jobs SET num_requests = num_requests + ? WHERE job = ?", (len(new), job.job)
        )
        return self.job(name)

    def close_job(self, name: str, num_requests: int, now: float) -> JobRow:
        job = self.job(name)
        if job.state == "cancelled":
            raise RequestError("closed", f"job {name!r} is cancelled")
        if job.num_requests != num_requests:
            raise RequestError(
                "gap", f"job {name!r} has {job.num_requests} requests, not {num_requests}"
            )
        if job.state == "open":
            self._db.execute(
                "UPDATE jobs SET state = 'closed', ended_at = COALESCE(ended_at, ?) WHERE job = ?",
                (now, job.job),
            )
        return self.job(name)

    def cancel_job(self, name: str, now: float) -> JobRow:
        """Its requests are for `remove_some` to remove."""
        job = self.job(name)
        if not job.is_over:
            self._db.execute(
                "UPDATE jobs SET state = 'cancelled', ended_at = ? WHERE job = ?", (now, job.job)
            )
        return self.job(name)

    def delete_job(self, name: str) -> int | None:
        """The name is free at once; what the job held is for `remove_some`. Returns its number,
        None when there is no such job."""
        job = self.find(name)
        if job is None:
            return None
        if not job.is_over:
            raise RequestError("unfinished", f"job {name!r} is not finished; cancel it first")
        self._db.execute("UPDATE jobs SET name = NULL, state = 'deleted' WHERE job = ?", (job.job,))
        return job.job

    def to_remove(self) -> list[int]:
        """Jobs, cancelled or deleted, of which something may be left to remove."""
        query = "SELECT job FROM jobs WHERE state IN ('cancelled', 'deleted')"
        return [job for (job,) in self._db.execute(query)]

    def remove_some(self, job: int, count: int) -> bool:
        """Removes up to `count` requests of a cancelled job, and results of a deleted one; whether
        that was all."""
        query = "SELECT state FROM jobs WHERE job = ?"
        state = self._db.execute(query, (job,)).fetchone()
        tables = {None: (), ("cancelled",): (("requests", "seq"), ("started", "seq"))}.get(
            state, (("requests", "seq"), ("started", "seq"), ("results", "position"))
        )
        for table, place in tables:
            removed = self._db.execute(
                f"DELETE FROM {table} WHERE job = :job AND {place} IN (SELECT {place} FROM {table} "
                "WHERE job = :job LIMIT :count)",
                {"job": job, "count": count},
            ).rowcount
            self._db.execute(f"PRAGMA incremental_vacuum({count})").fetchall()
            if removed == count:
                return False
        self._db.execute("DELETE FROM jobs WHERE job = ? AND state = 'deleted'", (job,))
        return True

    # Requests and results

    def pending(self, job: int, from_seq: int, most: int) -> Iterator[tuple[int, bytes]]:
        """Requests without a result, by seq."""
        query = "SELECT seq, request FROM requests WHERE job = ? AND seq >= ? ORDER BY seq LIMIT ?"
        return self._db.execute(query, (job, from_seq, most))

    def start(self, places: Iterable[tuple[int, int]]) -> None:
        """These requests, (job, seq), are about to run."""
        self._db.executemany(
            "INSERT INTO started (job, seq, running) VALUES (?, ?, 1) "
            "ON CONFLICT (job, seq) DO UPDATE SET running = 1",
            places,
        )

    def stop(self, places: Iterable[tuple[int, int]]) -> None:
        """These run no longer and have no result."""
        self._db.executemany("UPDATE started SET running = 0 WHERE job = ? AND seq = ?", places)

    def deaths(self) -> dict[tuple[int, int], int]:
        """Of requests that ran when a coordinator died, how often that was."""
        query = "SELECT job, seq, deaths FROM started WHERE deaths > 0"
        return {(job, seq): deaths for job, seq, deaths in self._db.execute(query)}

    def finish(self, outcomes: Iterable[Outcome], now: float) -> None:
        """Writes results, in this order. One of a request that has a result, or whose job was
        cancelled, is dropped."""
        states: dict[int, tuple[str, int]] = {}
        for outcome in outcomes:
            place = (outcome.job, outcome.seq)
            self._db.execute("DELETE FROM started WHERE job = ? AND seq = ?", place)
            note = self._db.execute(
                "SELECT note FROM requests WHERE job = ? AND seq = ?", place
            ).fetchone()
            if outcome.job not in states:
                query = "SELECT state, num_results FROM jobs WHERE job = ?"
                found = self._db.execute(query, (outcome.job,)).fetchone()
                states[outcome.job] = found or ("deleted", 0)
            state, position = states[outcome.job]
            if note is None or state not in ("open", "closed"):
                continue
            states[outcome.job] = state, position + 1
            self._db.execute("DELETE FROM requests WHERE job = ? AND seq = ?", place)
            self._db.execute(
                "INSERT INTO results VALUES (?, ?, ?, ?, ?, ?)",
                (outcome.job, position, outcome.seq, note[0], now, outcome.result),
            )
            self._db.execute(
                "UPDATE jobs SET num_results = num_results + 1, num_failed = num_failed + ?, "
                "prompt_tokens = prompt_tokens + ?, output_tokens = output_tokens + ?, "
                "ended_at = ? WHERE job = ?",
                (outcome.failed, outcome.prompt_tokens, outcome.output_tokens, now, outcome.job),
            )

    def results(self, job: int, position: int) -> list[ResultRow]:
        """A page of results from a position on."""
        return read_results(self._db, job, position)

    def _check_room(self, size_bytes: int) -> None:
        if self.used_bytes + size_bytes > MAX_JOURNAL_BYTES:
            raise RequestError(
                "journal_full",
                f"the journal would grow beyond {MAX_JOURNAL_BYTES} bytes; delete jobs whose "
                "results were fetched",
            )


def read_jobs(connection: sqlite3.Connection) -> list[JobRow]:
    """All jobs of a journal, oldest first."""
    query = f"SELECT {_JOB_FIELDS} FROM jobs WHERE name IS NOT NULL ORDER BY job"
    return [JobRow(*row) for row in connection.execute(query)]


def read_results(
    connection: sqlite3.Connection, job: int, position: int, most: int = PAGE_RESULTS
) -> list[ResultRow]:
    """A page of a job's results from a position on."""
    query = (
        "SELECT position, seq, note, finished_at, result FROM results "
        "WHERE job = ? AND position >= ? ORDER BY position LIMIT ?"
    )
    rows: list[ResultRow] = []
    size_bytes = 0
    for row in connection.execute(query, (job, position, most)):
        found = ResultRow(*row)
        rows.append(found)
        size_bytes += len(found.note) + len(found.result)
        if size_bytes >= PAGE_BYTES:
            break
    return rows
