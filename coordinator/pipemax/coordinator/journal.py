"""The journal: jobs, their requests and their results, in SQLite.

A request is in `requests` until it has its result, and then in `results`: one transaction moves it,
so that it has exactly one whatever dies when. Results have positions in the order in which they
came, without gaps; who has read up to a position can go on from it. A request that failed is kept
in `failed`, for another job to run it again.

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
from pipemax.coordinator.journal_rows import (
    JOB_FIELDS,
    JobRow,
    Outcome,
    ResultRow,
    read_jobs,
    read_results,
    sealed,
)
from pipemax.proto.errors import RequestError

_VACUUM_PAGES = 2000
"""Given back to the file system at a time: 16 MiB, some of which must be moved for it."""
_RETRY_REQUESTS = 256
_RETRY_BYTES = 4 * 2**20
"""Of failed requests moved to another job in one transaction; a single one may be larger."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JournalLimits:
    max_jobs: int = 1000
    """Finished ones included."""
    max_bytes: int = 256 * 2**30
    """What would make it larger is refused; results of what was taken are always written."""


class Journal:
    """One process has it open. Raises ConfigError as `journal_file.open_existing`."""

    def __init__(self, path: Path, limits: JournalLimits | None = None) -> None:
        """Opens it, or makes a new one. Requests that ran when it was last open, and whose
        coordinator did not say otherwise, were running at its death."""
        self.path = path
        self._limits = limits or JournalLimits()
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
                self._db.execute("UPDATE started SET running = 0, started_at = NULL")
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
        return int((pages - self._free_pages) * self._page_bytes)

    @property
    def _free_pages(self) -> int:
        (free,) = self._db.execute("PRAGMA freelist_count").fetchone()
        return int(free)

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
        row = self._db.execute(f"SELECT {JOB_FIELDS} FROM jobs WHERE name = ?", (name,)).fetchone()
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
        self._check_count()
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
            [
                (job.job, seq, *map(sealed, entry))
                for seq, entry in enumerate(new, job.num_requests)
            ],
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
        """Removes up to `count` requests of a cancelled job, and results of a deleted one. Gives
        room back to the file system. Returns whether that was all."""
        query = "SELECT state FROM jobs WHERE job = ?"
        state = self._db.execute(query, (job,)).fetchone()
        unfinished = (("requests", "seq"), ("started", "seq"))
        tables = {None: (), ("cancelled",): unfinished}.get(
            state, (*unfinished, ("failed", "seq"), ("results", "position"))
        )
        removed = 0
        for table, place in tables:
            removed = self._db.execute(
                f"DELETE FROM {table} WHERE job = :job AND {place} IN (SELECT {place} FROM {table} "
                "WHERE job = :job LIMIT :count)",
                {"job": job, "count": count},
            ).rowcount
            if removed:
                break
        free_pages = self._free_pages
        for _ in range(min(free_pages, _VACUUM_PAGES)):
            self._db.execute("PRAGMA incremental_vacuum(1)")  # of more, sqlite3 steps to the first
        if removed or free_pages > _VACUUM_PAGES:
            return False
        self._db.execute("DELETE FROM jobs WHERE job = ? AND state = 'deleted'", (job,))
        return True

    # Requests and results

    def pending(self, job: int, from_seq: int, most: int) -> Iterator[tuple[int, bytes]]:
        """Requests without a result, sealed, by seq."""
        query = "SELECT seq, request FROM requests WHERE job = ? AND seq >= ? ORDER BY seq LIMIT ?"
        return self._db.execute(query, (job, from_seq, most))

    def start(self, places: Iterable[tuple[int, int]], now: float) -> None:
        """These requests, (job, seq), are about to run. The time of the first start counts, also
        if the coordinator dies."""
        self._db.executemany(
            "INSERT INTO started (job, seq, running, started_at) VALUES (?, ?, 1, ?) "
            "ON CONFLICT (job, seq) DO UPDATE SET running = 1, "
            "started_at = COALESCE(started_at, excluded.started_at)",
            ((*place, now) for place in places),
        )

    def stop(self, places: Iterable[tuple[int, int]]) -> None:
        """These run no longer and have no result."""
        self._db.executemany(
            "UPDATE started SET running = 0, started_at = NULL WHERE job = ? AND seq = ?", places
        )

    def deaths(self) -> dict[tuple[int, int], int]:
        """Of requests that ran when a coordinator died, how often that was."""
        query = "SELECT job, seq, deaths FROM started WHERE deaths > 0"
        return {(job, seq): deaths for job, seq, deaths in self._db.execute(query)}

    def started_at(self) -> dict[tuple[int, int], float]:
        """Unix time at which unfinished requests were first started, if that start was not stopped
        on purpose."""
        query = "SELECT job, seq, started_at FROM started WHERE started_at IS NOT NULL"
        return {(job, seq): started_at for job, seq, started_at in self._db.execute(query)}

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
            if outcome.failed and outcome.can_be_retried:
                self._db.execute(
                    "INSERT INTO failed SELECT * FROM requests WHERE job = ? AND seq = ?", place
                )
            self._db.execute("DELETE FROM requests WHERE job = ? AND seq = ?", place)
            self._db.execute(
                "INSERT INTO results VALUES (?, ?, ?, ?, ?, ?)",
                (outcome.job, position, outcome.seq, note[0], now, sealed(outcome.result)),
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

    # Running again what failed

    def retry_job(
        self, name: str, retry: str, model_name: str, settings: str, now: float
    ) -> JobRow:
        """Moves some of the failed requests of a job that is over to the job named `retry`, which
        is made if need be, and closed when all are there."""
        job = self.job(name)
        found = self.find(retry)
        if found is None:
            self._begin_retry(job, retry, model_name, settings, now)
        elif self._retry_of(found) != job.job:
            raise RequestError("other_job", f"a job named {retry!r} was opened for something else")
        elif found.state != "open":
            return found
        target = self.job(retry)
        seqs: list[int] = []
        size_bytes = 0
        query = "SELECT seq, note, request FROM failed WHERE job = ? ORDER BY seq LIMIT ?"
        for seq, note, request in self._db.execute(query, (job.job, _RETRY_REQUESTS)).fetchall():
            if seqs and size_bytes + len(request) > _RETRY_BYTES:
                break
            entry = (target.job, target.num_requests + len(seqs), note, request)
            self._db.execute("INSERT INTO requests VALUES (?, ?, ?, ?)", entry)
            seqs.append(seq)
            size_bytes += len(request)
        self._db.executemany(
            "DELETE FROM failed WHERE job = ? AND seq = ?", ((job.job, seq) for seq in seqs)
        )
        total = target.num_requests + len(seqs)
        self._db.execute("UPDATE jobs SET num_requests = ? WHERE job = ?", (total, target.job))
        if self._has_failed(job):
            return self.job(retry)
        return self.close_job(retry, total, now)

    def _begin_retry(
        self, job: JobRow, retry: str, model_name: str, settings: str, now: float
    ) -> None:
        if not job.is_over:
            raise RequestError(
                "unfinished", f"job {job.name!r} is not finished: some more may fail"
            )
        if not self._has_failed(job):
            raise RequestError(
                "nothing_failed", f"job {job.name!r} has no failed requests to run again"
            )
        self._check_count()
        self._db.execute(
            "INSERT INTO jobs (name, state, about, model_name, settings, created_at, retry_of) "
            "VALUES (?, 'open', x'', ?, ?, ?, ?)",
            (retry, model_name, settings, now, job.job),
        )

    def _retry_of(self, job: JobRow) -> int | None:
        query = "SELECT retry_of FROM jobs WHERE job = ?"
        (of,) = self._db.execute(query, (job.job,)).fetchone()
        return None if of is None else int(of)

    def _has_failed(self, job: JobRow) -> bool:
        query = "SELECT 1 FROM failed WHERE job = ? LIMIT 1"
        return self._db.execute(query, (job.job,)).fetchone() is not None

    # Limits

    def _check_count(self) -> None:
        most = self._limits.max_jobs
        (count,) = self._db.execute("SELECT COUNT(*) FROM jobs").fetchone()
        if count >= most:
            raise RequestError(
                "too_many_jobs",
                f"the journal holds {most} jobs; delete some that are finished (`pipemax jobs "
                "--delete-older-than`), or start the system with a larger --max-jobs",
            )

    def _check_room(self, size_bytes: int) -> None:
        most = self._limits.max_bytes
        if self.used_bytes + size_bytes > most:
            raise RequestError(
                "journal_full",
                f"the journal would grow beyond {most} bytes; delete jobs whose results were "
                "fetched, or start the system with a larger --max-journal-size",
            )
