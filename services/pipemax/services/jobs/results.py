"""`pipemax results`: a job's results as lines of a file, each once, however often it is run.

A job's results keep their order, and each is one line: as many lines as the file has, so many
results were fetched, and the next run goes on behind them.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec

from pipemax.client import JobInfo, Jobs
from pipemax.coordinator.journal_file import journal_path
from pipemax.coordinator.journal_reader import JournalReader
from pipemax.proto.errors import ConfigError, PipemaxSystemError, RequestError
from pipemax.proto.messages.ingest import JobResult
from pipemax.proto.rundir import launcher_pid, run_dir_of
from pipemax.services.batch.files import locked
from pipemax.services.batch.manifest import can_have_one
from pipemax.services.batch.outputs import (
    ResultFile,
    check_output,
    pack,
    repair_tail,
    unpack,
    working_file,
)
from pipemax.services.jobs.notes import completion_of, output_line
from pipemax.services.where import Where

_LOOK_AGAIN_S = 0.5
_READ_BYTES = 2**20


class Source(Protocol):
    """Where results come from."""

    def info(self, job: str) -> JobInfo:
        """Raises RequestError or ConfigError when there is no such job."""
        ...

    def page(self, job: str, position: int) -> tuple[JobInfo, list[JobResult]]:
        """The next results from a position on, none when there are no more by now."""
        ...


class _Running:
    """A running system."""

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs

    def info(self, job: str) -> JobInfo:
        return self._jobs.info(job)

    def page(self, job: str, position: int) -> tuple[JobInfo, list[JobResult]]:
        answer = self._jobs.results(job, position)
        return answer.job, list(answer.results)


class _AtRest:
    """A journal that no system uses."""

    def __init__(self, reader: JournalReader) -> None:
        self._reader = reader

    def info(self, job: str) -> JobInfo:
        for info in self._reader.jobs():
            if info.name == job:
                return info
        raise RequestError("unknown_job", f"the journal has no job named {job!r}")

    def page(self, job: str, position: int) -> tuple[JobInfo, list[JobResult]]:
        return self.info(job), self._reader.page(job, position)


@dataclass(frozen=True, slots=True)
class Fetched:
    job: JobInfo
    new: int
    """Lines written in this run."""
    failed: int
    """Of these, error lines."""
    lines: int
    """In the output now."""


@contextlib.contextmanager
def source_of(system: Where, journal: Path | None, tell: Callable[[str], None]) -> Iterator[Source]:
    """The running system of that name; without one its journal, or the one that is given. Raises
    NotRunningError or ConfigError when there is neither."""
    path = journal or (None if system.is_elsewhere else journal_path(system.name))
    if journal is None and path is not None:
        runs = launcher_pid(run_dir_of(system.name)) is not None
        path = None if runs or not path.exists() else path
    if path is None:
        with system.jobs("results") as jobs:
            yield _Running(jobs)
        return
    tell(f"reading {path}; no system is asked")
    with JournalReader(path) as reader:
        yield _AtRest(reader)
        if reader.unreadable:
            tell(f"{reader.unreadable} results could not be read: the journal is damaged")


def fetch(
    source: Source, name: str, output: Path, *, follow: bool = False, overwrite: bool = False
) -> Fetched:
    """Appends the results that `output` does not have yet. With `follow`, waits for those to come.

    Raises ConfigError when there is no such job, the output holds something else or what is to come
    cannot come in this system, and PipemaxSystemError when it cannot be written; run again, it goes
    on.
    """
    check_output(output)
    try:
        job = source.info(name)
    except RequestError as error:
        raise ConfigError(f"{error}; `pipemax jobs` lists them") from error
    with contextlib.ExitStack() as stack:
        if can_have_one(output):
            stack.enter_context(locked(output))
        before = _open(source, name, output, overwrite=overwrite)
        with contextlib.closing(ResultFile(working_file(output))) as file:
            fetched = _append(source, job, file, before, follow=follow)
        if fetched.job.state in ("finished", "cancelled") and can_have_one(output):
            pack(working_file(output), output)
    return fetched


def _append(
    source: Source, job: JobInfo, file: ResultFile, before: int, *, follow: bool
) -> Fetched:
    position, failed = before, 0
    while True:
        job, results = source.page(job.name, position)
        for result in results:
            file.write(output_line(job, result))
            failed += completion_of(result).error is not None
        position += len(results)
        over = job.state in ("finished", "cancelled") and position >= job.num_results
        if over or not (results or follow):
            return Fetched(job, position - before, failed, position)
        if job.state == "held":
            raise ConfigError(
                f"job {job.name!r} waits for a system like that which took it: same model, name of "
                "the model, dtype and seed; what was finished before is in the output"
            )
        if not results:
            time.sleep(_LOOK_AGAIN_S)


def _open(source: Source, name: str, output: Path, *, overwrite: bool) -> int:
    """Makes the working file ready. Returns how many results it has."""
    working = working_file(output)
    if not can_have_one(output):
        return 0
    try:
        if overwrite:
            working.write_bytes(b"")
            return 0
        if working != output and not working.exists() and output.exists():
            unpack(output, working)
        if not working.exists():
            return 0
        repair_tail(working)
        lines, last = _lines_of(working)
    except OSError as error:
        raise PipemaxSystemError(f"cannot write {working}: {error.strerror}") from error
    if lines:
        _check_last(source, name, output, lines, last)
    return lines


def _check_last(source: Source, name: str, output: Path, lines: int, last: bytes) -> None:
    """Raises ConfigError when the last line of an output is not that of the job's result there."""
    job, results = source.page(name, lines - 1)
    with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError):
        found = msgspec.json.decode(last, type=_Id)
        if results and found == msgspec.json.decode(output_line(job, results[0]), type=_Id):
            return
    raise ConfigError(
        f"{output} holds lines that are not results of job {name!r} in their order; give another "
        "output, or --overwrite to start over"
    )


class _Id(msgspec.Struct):
    """What tells a line from others."""

    id: str
    custom_id: str | None


def _lines_of(path: Path) -> tuple[int, bytes]:
    """How many lines there are, all of them whole, and the last one."""
    count, last = 0, b""
    with path.open("rb", buffering=_READ_BYTES) as source:
        for line in source:
            last = line
            count += 1
    return count, last
