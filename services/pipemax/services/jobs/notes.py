"""What `submit` leaves with a job and with each request, and finds again with the results."""

from collections.abc import Iterable

import msgspec

from pipemax.client import Completion, JobRequest
from pipemax.proto.errors import ConfigError
from pipemax.proto.messages.ingest import Finished, JobInfo, JobResult, Refused
from pipemax.services.batch.inputs import Fingerprint
from pipemax.services.batch.openai_lines import BatchRequest, LineError
from pipemax.services.batch.openai_results import (
    ResultForm,
    error_line,
    partial_body,
    result_line,
)
from pipemax.services.batch.tally import status_of


class About(msgspec.Struct, frozen=True, array_like=True):
    """By which a second `submit` of the same files knows its job."""

    inputs: tuple[tuple[int, str], ...]
    """Lines that are not blank and blake2b of each file."""
    pipe: str | None = None
    """Of a job whose lines came through a pipe: a random word, as they cannot be read again."""
    request_timeout_s: float | None = None

    @classmethod
    def of(cls, found: Iterable[Fingerprint], request_timeout_s: float | None) -> "About":
        return cls(tuple((f.lines, f.blake2b) for f in found), None, request_timeout_s)


class LineNote(msgspec.Struct, frozen=True, array_like=True):
    """About one line."""

    line: int
    """Its number, from 1."""
    file: str | None = None
    """Where there are several."""
    custom_id: str | None = None
    """None: it could not be read."""
    form: ResultForm = ResultForm()
    """Of its output line."""
    status: int = 400
    """For its error line, if it was none that could be run."""


def request_of(found: BatchRequest, line: int, file: str | None) -> JobRequest:
    """A line that can be run."""
    note = LineNote(line, file, found.custom_id, found.form)
    return JobRequest(note=msgspec.msgpack.encode(note), request=found.submit)


def refusal_of(error: LineError, line: int, file: str | None) -> JobRequest:
    """A line that cannot."""
    custom_id = error.custom_id
    note = LineNote(line, file, custom_id, status=error.status)
    refused = Refused(request_id=f"line-{line}", code=error.code[:256], message=str(error)[:4096])
    return JobRequest(note=msgspec.msgpack.encode(note), request=refused)


def output_line(job: JobInfo, found: JobResult) -> bytes:
    """The line of one result, without its line break. Raises ConfigError when the job is not one of
    batch lines."""
    note = _note(job, found)
    completion = completion_of(found)
    if completion.error is None and note.custom_id is not None:
        return result_line(
            note.custom_id,
            note.form,
            completion,
            model_name=job.model_name,
            created=int(found.finished_at),
        )
    code, created = completion.error_code or "failed", int(found.finished_at)
    return error_line(
        note.custom_id,
        completion.request_id,
        status=status_of(code, note.status),
        code=code,
        body=partial_body(note.form, completion, model_name=job.model_name, created=created),
        message=completion.error or "",
        line=note.line,
        file=note.file,
    )


def completion_of(found: JobResult) -> Completion:
    """As a connected client would have got it."""
    if isinstance(found.result, Finished):
        return Completion.of(found.result, found.seq)
    refused = found.result
    return Completion.refused(refused.request_id or "", found.seq, refused.code, refused.message)


def _note(job: JobInfo, found: JobResult) -> LineNote:
    if not found.note and isinstance(found.result, Refused):
        return LineNote(0)  # what stands for a result that a damaged journal does not give
    try:
        return msgspec.msgpack.decode(found.note, type=LineNote)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"job {job.name!r} was not made of batch lines by `pipemax submit`: fetch its results "
            "with pipemax.client.Jobs"
        ) from error
