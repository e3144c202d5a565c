"""Reading a journal that no system uses: results outlive the system, and what damage spares."""

import sqlite3
from pathlib import Path

from pipemax.coordinator import journal_file
from pipemax.coordinator.jobs_round import DAMAGED, UNREADABLE, damaged, page_of
from pipemax.coordinator.journal_rows import (
    PAGE_RESULTS,
    JobRow,
    ResultRow,
    read_jobs,
    read_results,
)
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
                    return self._read(row, rows)
            except (sqlite3.DatabaseError, *UNREADABLE):
                continue
        self.unreadable += 1
        return [damaged(position)]

    def _read(self, row: JobRow, rows: list[ResultRow]) -> list[ingest.JobResult]:
        page = page_of(0, row.info(row.settings), rows[0].position, rows)
        refused = [
            found.result for found in page.results if found.result.__class__ is ingest.Refused
        ]
        self.unreadable += sum(result.code == DAMAGED for result in refused)
        return list(page.results)

    def _rows(self) -> list[JobRow]:
        try:
            return read_jobs(self._db)
        except sqlite3.DatabaseError as error:
            raise ConfigError(f"the journal {self._path} cannot be read: {error}") from error


def _without_gaps(rows: list[ResultRow]) -> bool:
    return all(row.position == rows[0].position + n for n, row in enumerate(rows))
