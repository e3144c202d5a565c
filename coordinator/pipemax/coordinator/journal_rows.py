"""What a journal holds, as it is read: by the system that has it open, or by whoever looks at one
that no system uses."""

import sqlite3
import zlib
from dataclasses import dataclass

from pipemax.proto.messages.ingest import JobInfo, JobState

PAGE_RESULTS = 256
PAGE_BYTES = 2**18
"""Results are read until they are so many or so large, but at least one."""
_CHECKSUM_BYTES = 4

JOB_FIELDS = (
    "job, name, state, about, model_name, settings, created_at, ended_at, num_requests, "
    "num_results, num_failed, prompt_tokens, output_tokens"
)


class DamagedError(Exception):
    """The journal does not hold what was written."""


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
    can_be_retried: bool = True
    """If it failed: the request is kept, to be run again when that is asked for."""


@dataclass(frozen=True, slots=True)
class ResultRow:
    position: int
    seq: int
    note: bytes
    """Sealed, as is the result."""
    finished_at: float
    result: bytes


def read_jobs(connection: sqlite3.Connection) -> list[JobRow]:
    """All jobs of a journal, oldest first."""
    query = f"SELECT {JOB_FIELDS} FROM jobs WHERE name IS NOT NULL ORDER BY job"
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


def sealed(blob: bytes) -> bytes:
    """With its checksum. SQLite has none: a message that a flipped bit turns into another one would
    be taken for what was written."""
    return blob + zlib.crc32(blob).to_bytes(_CHECKSUM_BYTES, "little")


def unsealed(blob: bytes) -> bytes:
    """Raises DamagedError, or TypeError for what is not even bytes."""
    content, checksum = blob[:-_CHECKSUM_BYTES], blob[-_CHECKSUM_BYTES:]
    if zlib.crc32(content).to_bytes(_CHECKSUM_BYTES, "little") != checksum:
        raise DamagedError("it is not what was written")
    return content
