"""A batch file run through a client: lines in, lines out as they finish."""

import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import BinaryIO, Protocol

from pipemax.client import Client, Completion
from pipemax.proto.errors import ConfigError, PipemaxSystemError, RequestError
from pipemax.services.openai_batch import (
    BatchRequest,
    LineError,
    error_line,
    parse_line,
    result_line,
)

MAX_LINE_BYTES = 16 * 2**20
"""Longest input line; longer ones could not be sent to the coordinator."""
_STATUS_OF_CODE = {"failed": 500, "draining": 503}
"""HTTP's word for what is not the request's own fault; all else is 400."""
_READ_BYTES = 2**20
_UTF8_MARK = b"\xef\xbb\xbf"


class BatchProgress(Protocol):
    """Is told how a batch gets on."""

    def start(self, num_requests: int) -> None: ...

    def finished(self, num_tokens: int) -> None:
        """One request is done; `num_tokens` is its prompt and output, 0 if it was not served."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchReport:
    """What a batch came to."""

    completed: int
    failed: int
    """Lines answered by an error line."""
    prompt_tokens: int
    """Of completed requests."""
    output_tokens: int
    seconds: float
    first_error: str | None = None
    """Of the first line that was answered by an error line."""

    @property
    def requests(self) -> int:
        return self.completed + self.failed

    @property
    def throughput(self) -> str:
        """One line, in the form users of vLLM know."""
        seconds = max(self.seconds, 1e-9)
        total = self.prompt_tokens + self.output_tokens
        return (
            f"Throughput: {self.completed / seconds:.2f} requests/s, "
            f"{total / seconds:.2f} total tokens/s, "
            f"{self.output_tokens / seconds:.2f} output tokens/s"
        )


def check_input(path: Path) -> None:
    """Raises ConfigError unless `path` is a file that can be read, and read again: its lines are
    counted first."""
    try:
        if not (path.is_dir() or stat.S_ISREG(path.stat().st_mode)):
            raise ConfigError(f"cannot read {path}: not a regular file; write the lines to one")
        with path.open("rb"):
            pass
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; give a .jsonl file") from error


def check_output(path: Path, input_path: Path | None = None) -> None:
    """Raises ConfigError unless results can be written to `path`: to be called before anything is
    loaded. Leaves nothing behind and an existing file as it is (the batch will overwrite it)."""
    try:
        existed = path.exists() or path.is_symlink()
        if input_path is not None and _same_file(path, input_path):
            raise ConfigError(f"{path} is both input and output; give another output")
        with path.open("ab"):
            pass
        if not existed:
            path.unlink()
    except OSError as error:
        raise ConfigError(
            f"cannot write {path}: {error.strerror}; give a path in a writable folder"
        ) from error


def _same_file(one: Path, other: Path) -> bool:
    return one.exists() and other.exists() and one.samefile(other)


def run_batch(
    client: Client,
    input_path: Path,
    output_path: Path,
    progress: BatchProgress | None = None,
) -> BatchReport:
    """Runs every line of `input_path` and writes a line for each to `output_path`.

    Lines are written, and flushed, as requests finish, so their order is not the input's: match
    them by `custom_id`. The input is read as fast as requests finish and never held as a whole. A
    bad line gets an error line; blank lines are skipped.

    Raises PipemaxSystemError when the system ends meanwhile or the output cannot be written; what
    was written stays.
    """
    job = _Job(client, progress or _Quiet())
    with input_path.open("rb") as source:
        job.progress.start(sum(1 for _ in _lines(source)))
    started_at = time.monotonic()
    # Unbuffered: a line is in the file as soon as its request is done, and closing the file has
    # nothing left to write when the disk is full.
    with input_path.open("rb") as source, output_path.open("wb", buffering=0) as sink:
        job.run(source, sink)
    return BatchReport(
        completed=job.completed,
        failed=job.failed,
        prompt_tokens=job.prompt_tokens,
        output_tokens=job.output_tokens,
        seconds=time.monotonic() - started_at,
        first_error=job.first_error,
    )


class _Job:
    """The state of one run."""

    def __init__(self, client: Client, progress: BatchProgress) -> None:
        self.progress = progress
        self.completed = self.failed = self.prompt_tokens = self.output_tokens = 0
        self.first_error: str | None = None
        self._client = client
        self._unfinished: dict[str, tuple[int, BatchRequest]] = {}
        """(line number, request) by request id."""
        self._seen: dict[str, int] = {}
        """Line number by custom_id, to find the second use of one."""

    def run(self, source: BinaryIO, sink: FileIO) -> None:
        lines = _lines(source)
        more = True
        while more or self._unfinished:
            while more and self._client.free_credits:
                number, line = next(lines, (0, b""))
                more = number > 0
                if more:
                    self._submit(number, line, sink)
            if self._unfinished:
                completion = self._client.poll()
                if completion is not None:
                    self._finish(completion, sink)

    def _submit(self, number: int, line: bytes | None, sink: FileIO) -> None:
        request_id, custom_id = f"line-{number}", None
        try:
            request = self._parse(number, line)
            request_id, custom_id = request.submit.request_id, request.custom_id
            self._client.submit(request.submit)
        except RequestError as error:
            status = error.status if isinstance(error, LineError) else 400
            custom_id = error.custom_id if isinstance(error, LineError) else custom_id
            self._fail(sink, number, custom_id, request_id, status, error.code, str(error))
        else:
            self._unfinished[request_id] = (number, request)

    def _parse(self, number: int, line: bytes | None) -> BatchRequest:
        if line is None:
            raise LineError("too_large", f"the line is longer than {MAX_LINE_BYTES} bytes")
        request = parse_line(line, self._client.model_name)
        first = self._seen.setdefault(request.custom_id, number)
        if first != number:
            error = LineError("duplicate_custom_id", f"custom_id is that of line {first} already")
            error.custom_id = request.custom_id
            raise error
        return request

    def _finish(self, completion: Completion, sink: FileIO) -> None:
        request_id = completion.request_id
        number, request = self._unfinished.pop(request_id)
        if completion.error is not None:
            code = completion.error_code or "failed"
            status = _STATUS_OF_CODE.get(code, 400)
            message = completion.error
            self._fail(sink, number, request.custom_id, request_id, status, code, message)
            return
        created, model_name = int(time.time()), self._client.model_name
        self._write(sink, result_line(request, completion, model_name=model_name, created=created))
        self.completed += 1
        self.prompt_tokens += completion.num_prompt_tokens
        self.output_tokens += len(completion.token_ids)
        self.progress.finished(completion.num_prompt_tokens + len(completion.token_ids))

    def _fail(
        self,
        sink: FileIO,
        number: int,
        custom_id: str | None,
        request_id: str,
        status: int,
        code: str,
        message: str,
    ) -> None:
        self._write(
            sink,
            error_line(
                custom_id, request_id, status=status, code=code, message=message, line=number
            ),
        )
        self.failed += 1
        if self.first_error is None:
            self.first_error = f"line {number}: {message}"
        self.progress.finished(0)

    def _write(self, sink: FileIO, line: bytes) -> None:
        rest = memoryview(line + b"\n")
        try:
            while rest:
                rest = rest[sink.write(rest) :]
        except OSError as error:
            raise PipemaxSystemError(
                f"cannot write {sink.name}: {error.strerror}; make room and run the batch again"
            ) from error


def _lines(source: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """(number from 1, line) of every line that is not blank; None for one that is too long."""
    number = 0
    while line := source.readline(MAX_LINE_BYTES + 1):
        number += 1
        if number == 1:
            line = line.removeprefix(_UTF8_MARK)
        if len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
            while (rest := source.readline(_READ_BYTES)) and not rest.endswith(b"\n"):
                pass
            yield number, None
        elif line.strip():
            yield number, line


class _Quiet:
    def start(self, num_requests: int) -> None:
        pass

    def finished(self, num_tokens: int) -> None:
        pass
