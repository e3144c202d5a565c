"""`pipemax submit`: hands the lines of batch files to a running system, each once."""

import hashlib
import re
import secrets
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from pipemax.client import JobInfo, JobRequest, Jobs
from pipemax.proto.errors import ConfigError, RequestError
from pipemax.proto.messages.ingest import JobName
from pipemax.proto.wire import encode
from pipemax.services.batch import inputs
from pipemax.services.batch.inputs import STDIN, InputLine, check_input, fingerprint
from pipemax.services.batch.openai_lines import BatchRequest, LineError, parse_line
from pipemax.services.batch.resume import Ledger
from pipemax.services.jobs.notes import About, refusal_of, request_of
from pipemax.services.where import Where

MAX_REQUEST_BYTES = 15 * 2**20
"""Of one request: with others' overhead it must fit in a message."""
_BATCH_REQUESTS = 256
_BATCH_BYTES = 2**20
_NAME_CHARS = 100


def submit_files(
    system: Where,
    paths: Sequence[Path],
    name: str | None,
    request_timeout_s: float | None = None,
) -> tuple[JobInfo, int]:
    """Makes a job of the files' lines, or goes on with one that was made of the same files and not
    completed. A line that cannot be run becomes a request that has failed already.
    `request_timeout_s` is how long each request may take once it was taken up to run. Returns the
    job, and how many of its requests were there before.

    Raises ConfigError when files or name cannot be used, NotRunningError without a system,
    PipemaxSystemError when a file cannot be read to its end, RequestError when the system cannot
    take (more of) the job; what it took, it keeps.
    """
    if paths.count(STDIN) > 1:
        raise ConfigError("standard input can be read once; give `-i -` once")
    for path in paths:
        check_input(path)
    about = About((), secrets.token_hex(8), request_timeout_s)
    if name is not None:
        check_job_name(name)
    if STDIN not in paths:
        about = About.of((fingerprint(path) for path in paths), request_timeout_s)
    with system.jobs("submit") as jobs:
        job = _open(jobs, name or _default_name(paths, about), about)
        before = job.num_requests
        if job.state in ("finished", "cancelled", "running"):
            return job, before
        upload = Upload(jobs, job)
        for request in requests_of(jobs, paths, request_timeout_s):
            upload.add(request)
        return upload.close(), before


def check_job_name(name: str) -> str:
    """Raises ConfigError for what is none."""
    try:
        return msgspec.convert(name, JobName)
    except msgspec.ValidationError as error:
        raise ConfigError(
            f"{name!r:.200} is no name of a job: use at most 128 letters, digits, dots, dashes and "
            "underscores"
        ) from error


def _open(jobs: Jobs, name: str, about: About) -> JobInfo:
    try:
        return jobs.open(name, msgspec.msgpack.encode(about))
    except RequestError as error:
        if error.code != "other_job":
            raise
        raise ConfigError(
            f"a job named {name!r} was made of other lines, for another model or with another "
            "--request-timeout; give another --job, or remove that one: `pipemax jobs --delete "
            f"{name}`"
        ) from error


def _default_name(paths: Sequence[Path], about: About) -> str:
    """The same for the same files."""
    if about.pipe is not None:
        return f"pipe-{time.strftime('%Y%m%d-%H%M%S')}-{about.pipe[:4]}"
    stem = re.sub(r"[^A-Za-z0-9._-]", "-", paths[0].name.split(".")[0])[:_NAME_CHARS]
    digest = hashlib.blake2b(repr(about.inputs).encode(), digest_size=4).hexdigest()
    return f"{stem.lstrip('._-') or 'job'}-{digest}"


def requests_of(jobs: Jobs, paths: Sequence[Path], timeout_s: float | None) -> Iterator[JobRequest]:
    """One for each line that is not blank. The same lines give the same requests. Raises
    PipemaxSystemError when a file cannot be read to its end."""
    ledger = Ledger()
    try:
        for file, path in enumerate(paths):
            label = str(path) if len(paths) > 1 else None
            for line in inputs.lines(path):
                try:
                    found = _request(jobs, ledger, paths, file, line)
                    found = found if timeout_s is None else found.within(timeout_s)
                    yield request_of(found, line.number, label)
                except LineError as error:
                    yield refusal_of(error, line.number, label)
    finally:
        ledger.close()


def _request(
    jobs: Jobs, ledger: Ledger, paths: Sequence[Path], file: int, line: InputLine
) -> BatchRequest:
    """Raises LineError."""
    if line.text is None:
        raise LineError("too_large", f"the line is longer than {inputs.MAX_LINE_BYTES} bytes")
    found = parse_line(line.text, jobs.model_name)
    label = str(paths[file]) if len(paths) > 1 else None
    error = None
    try:
        if jobs.check(found.submit) > MAX_REQUEST_BYTES:
            error = LineError("too_large", f"the request is larger than {MAX_REQUEST_BYTES} bytes")
    except RequestError as refusal:
        error = LineError(refusal.code, str(refusal))
    first = ledger.claim(found.custom_id, file, line.number)
    if first not in (None, (file, line.number)):
        of = f"{paths[first[0]]}, line {first[1]}" if label else f"line {first[1]}"
        error = LineError("duplicate_custom_id", f"custom_id is that of {of} already")
    if error is not None:
        error.custom_id = found.custom_id
        raise error
    return found


class Upload:
    """Sends requests in batches. Those that the job has already are read and passed over."""

    def __init__(self, jobs: Jobs, job: JobInfo) -> None:
        self._jobs = jobs
        self._job = job
        self._passed = 0
        self._batch: list[JobRequest] = []
        self._batch_bytes = 0

    def add(self, request: JobRequest) -> None:
        if self._passed < self._job.num_requests and not self._batch:
            self._passed += 1
            return
        size = len(encode(request.request)) + len(request.note)
        if self._batch_bytes + size > _BATCH_BYTES or len(self._batch) == _BATCH_REQUESTS:
            self._send()
        self._batch.append(request)
        self._batch_bytes += size

    def close(self) -> JobInfo:
        self._send()
        return self._jobs.close_job(self._job.name, self._passed)

    def _send(self) -> None:
        if self._batch:
            self._job = self._jobs.add(self._job.name, self._passed, self._batch)
            self._passed += len(self._batch)
            self._batch, self._batch_bytes = [], 0
