"""Reading a journal that no system uses: results outlive the system, and what damage spares."""

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import msgspec

from pipemax.coordinator import journal_file
from pipemax.coordinator.jobs_round import page_of
from pipemax.coordinator.journal import JobRow, ResultRow, read_jobs, read_results
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

    def results(self, name: str, position: int) -> Iterator[tuple[int, ingest.JobResult]]:
        """The job's results with their positions, from one on. Raises ConfigError when there is no
        such job."""
        row = next((row for row in self._rows() if row.name == name), None)
        if row is None:
            raise ConfigError(f"the journal {self._path} has no job {name!r}")
        while position < row.num_results:
            rows = self._page(row, position)
            yield from rows
            position = rows[-1][0] + 1 if rows else position + 1

    def _page(self, row: JobRow, position: int) -> list[tuple[int, ingest.JobResult]]:
        """Results from `position` on: at least that one, unless it is not readable."""
        for most in (256, 1):
            try:
                found = read_results(self._db, row.job, position, most)
                if most == 1:
                    found = [result for result in found if result.position == position]
                if found:
                    return [(result.position, self._decoded(row, result)) for result in found]
            except (sqlite3.DatabaseError, msgspec.DecodeError):
                continue
        self.unreadable += 1
        return []

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
