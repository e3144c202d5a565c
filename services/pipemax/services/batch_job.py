"""A batch file run through a client: lines in, lines out as they finish."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pipemax.client import Client, Completion
from pipemax.proto.errors import ConfigError, RequestError
from pipemax.services.openai_batch import (
    BatchRequest,
    LineError,
    error_line,
    parse_line,
    result_line,
)

MAX_LINE_BYTES = 16 * 2**20
"""Longest input line; longer ones could not be sent to the coordinator."""
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
    """Raises ConfigError unless `path` is a file that can be read."""
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; give a .jsonl file") from error


def check_output(path: Path, input_path: Path | None = None) -> None:
    """Raises ConfigError unless results can be written to `path`: to be called before anything is
    loaded. Leaves nothing behind and an existing file as it is (the batch will overwrite it)."""
    existed = path.exists() or path.is_symlink()
    if input_path is not None and _same_file(path, input_path):
        raise ConfigError(f"{path} is both input and output; give another output")
    try:
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

    Raises PipemaxSystemError when the system ends meanwhile; what was written stays.
    """
    job = _Job(client, progress or _Quiet())
    job.progress.start(_count_lines(input_path))
    started_at = time.monotonic()
    with input_path.open("rb") as source, output_path.open("wb") as sink:
        job.run(source, sink)
    return BatchReport(
        completed=job.completed,
        failed=job.failed,
        prompt_tokens=job.prompt_tokens,
        output_tokens=job.output_tokens,
        seconds=time.monotonic() - started_at,
    )


class _Job:
    """The state of one run."""

    def __init__(self, client: Client, progress: BatchProgress) -> None:
        self.progress = progress
        self.completed = self.failed = self.prompt_tokens = self.output_tokens = 0
        self._client = client
        self._unfinished: dict[str, tuple[int, BatchRequest]] = {}
        """(line number, request) by request id."""
        self._seen: dict[str, int] = {}
        """Line number by custom_id, to find the second use of one."""

    def run(self, source: BinaryIO, sink: BinaryIO) -> None:
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

    def _submit(self, number: int, line: bytes | None, sink: BinaryIO) -> None:
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

    def _finish(self, completion: Completion, sink: BinaryIO) -> None:
        request_id = completion.request_id
        number, request = self._unfinished.pop(request_id)
        if completion.error is not None:
            code = completion.error_code or "failed"
            status = 500 if code == "failed" else 400
            message = completion.error
            self._fail(sink, number, request.custom_id, request_id, status, code, message)
            return
        created, model_name = int(time.time()), self._client.model_name
        _write(sink, result_line(request, completion, model_name=model_name, created=created))
        self.completed += 1
        self.prompt_tokens += completion.num_prompt_tokens
        self.output_tokens += len(completion.token_ids)
        self.progress.finished(completion.num_prompt_tokens + len(completion.token_ids))

    def _fail(
        self,
        sink: BinaryIO,
        number: int,
        custom_id: str | None,
        request_id: str,
        status: int,
        code: str,
        message: str,
    ) -> None:
        _write(
            sink,
            error_line(
                custom_id, request_id, status=status, code=code, message=message, line=number
            ),
        )
        self.failed += 1
        self.progress.finished(0)


def _write(sink: BinaryIO, line: bytes) -> None:
    sink.write(line + b"\n")
    sink.flush()


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


def _count_lines(path: Path) -> int:
    """Lines of the file, the last one too if it has no line break; blank lines count."""
    count = 0
    last = b"\n"
    with path.open("rb") as source:
        while chunk := source.read(_READ_BYTES):
            count += chunk.count(b"\n")
            last = chunk[-1:]
    return count + (last != b"\n")


class _Quiet:
    def start(self, num_requests: int) -> None:
        pass

    def finished(self, num_tokens: int) -> None:
        pass


class TokenBar:
    """A progress bar in tokens on standard error; nothing when that is no terminal.

    The total is not known before the end: it is taken to be the requests' number times the mean
    tokens of those that finished, and so is the time remaining.
    """

    def __init__(self, console: Console | None = None) -> None:
        console = console or Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.fields[requests]}/{task.fields[num_requests]} requests"),
            BarColumn(),
            TextColumn("{task.completed:,.0f} tokens"),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=None, requests=0, num_requests=0, rate="")
        self._requests = self._num_requests = self._tokens = 0
        self._started_at = time.monotonic()

    def __enter__(self) -> "TokenBar":
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def start(self, num_requests: int) -> None:
        self._num_requests = num_requests
        self._started_at = time.monotonic()
        self._bar.update(self._task, num_requests=num_requests)

    def finished(self, num_tokens: int) -> None:
        self._requests += 1
        self._tokens += num_tokens
        expected = self._tokens * max(1.0, self._num_requests / self._requests)
        rate = self._tokens / max(time.monotonic() - self._started_at, 1e-9)
        self._bar.update(
            self._task,
            completed=self._tokens,
            total=expected or None,
            requests=self._requests,
            rate=f"{rate:,.0f} tokens/s",
        )
