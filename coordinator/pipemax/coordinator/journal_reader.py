"""Reading a journal that no system uses: results outlive the system, and what damage spares."""

import sqlite3
from pathlib import Path

import msgspec

from pipemax.coordinator import journal_file
from pipemax.coordinator.jobs_round import UNREADABLE, page_of
from pipemax.coordinator.journal import PAGE_RESULTS, JobRow, ResultRow, read_jobs, read_results
from pipemax.proto.errors import ConfigError
from pipemax.proto.messages import ingest


class JournalReader:
    """Raises ConfigError as `journal_file.open_read_only`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._db = journal_file.open_read_only(path)
        self.unreadable = 0
        """Results that were passed over because the file is damaged where they are."""

    def __enter__(self) -> "JournalReader":
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()

    def jobs(self) -> list[ingest.JobInfo]:
        """Oldest first; one that is not over is `running` or `open`. Raises ConfigError when the
        list itself is damaged."""
        return [row.info(row.settings) for row in self._rows()]

    def page(self, name: str, position: int) -> list[ingest.JobResult]:
        """The job's next results from a position on; none when there are no more. In the place of
        one that is not readable there is a refusal that says so. Raises ConfigError when there is
        no such job."""
        row = next((row for row in self._rows() if row.name == name), None)
        if row is None:
            raise ConfigError(f"the journal {self._path} has no job {name!r}")
        if position >= row.num_results:
            return []
        for most in (PAGE_RESULTS, 1):
            try:
                rows = read_results(self._db, row.job, position, most)
                if rows and rows[0].position == position and _without_gaps(rows):
                    return [self._decoded(row, found) for found in rows]
            except (sqlite3.DatabaseError, *UNREADABLE):
                continue
        self.unreadable += 1
        return [_unreadable(position)]

    def _decoded(self, row: JobRow, found: ResultRow) -> ingest.JobResult:
        page = page_of(0, row.info(row.settings), found.position, [found])
        if isinstance(page, ingest.JobRefused):
            raise msgspec.DecodeError(page.message)
        return page.results[0]

    def _rows(self) -> list[JobRow]:
        try:
            return read_jobs(self._db)
        except sqlite3.DatabaseError as error:
            raise ConfigError(f"the journal {self._path} cannot be read: {error}") from error


def _without_gaps(rows: list[ResultRow]) -> bool:
    return all(row.position == rows[0].position + n for n, row in enumerate(rows))


def _unreadable(position: int) -> ingest.JobResult:
    text = f"result {position} of the job could not be read: its journal is damaged there"
    refused = ingest.Refused(request_id=f"position-{position}", code="damaged", message=text)
    return ingest.JobResult(seq=0, note=b"", finished_at=0.0, result=refused)
