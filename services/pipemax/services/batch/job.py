"""Batch files run through a client: lines in, lines out as they finish."""

import time
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipemax.client import Client, Completion
from pipemax.proto.errors import RequestError
from pipemax.services.batch import inputs
from pipemax.services.batch.openai_lines import (
    BatchRequest,
    LineError,
    parse_line,
)
from pipemax.services.batch.openai_results import error_line, result_line
from pipemax.services.batch.outputs import ResultFile
from pipemax.services.batch.report import BatchProgress, BatchReport, Quiet
from pipemax.services.batch.resume import Ledger

_STATUS_OF_CODE = {"failed": 500, "draining": 503}
"""HTTP's word for what is not the request's own fault; all else is 400."""


@dataclass(frozen=True, slots=True)
class Route:
    """Inputs and where their lines' results go."""

    inputs: tuple[Path, ...]
    results: ResultFile
    errors: ResultFile
    """May be the same file."""
    ledger: Ledger


@dataclass(frozen=True, slots=True)
class _Line:
    route: Route
    file: int
    """Index among the route's inputs."""
    number: int
    text: bytes | None

    @property
    def label(self) -> str:
        """Of the file, for error lines; empty where there is only one."""
        return str(self.route.inputs[self.file]) if len(self.route.inputs) > 1 else ""

    def __str__(self) -> str:
        return f"{self.label}, line {self.number}" if self.label else f"line {self.number}"


def run_batch(
    client: Client,
    routes: Sequence[Route],
    progress: BatchProgress | None = None,
    num_requests: int | None = None,
) -> BatchReport:
    """Runs every line of the inputs that has no result yet and writes a line for each.

    Lines are written as requests finish, so their order is not the input's: match them by
    `custom_id`. Inputs are read as fast as requests finish and never held as a whole. A bad line
    gets an error line; blank lines are skipped.

    Raises PipemaxSystemError when the system ends meanwhile, an input cannot be read on or an
    output not be written; what was written stays.
    """
    progress = progress or Quiet()
    progress.start(num_requests)
    job = _Job(client, progress)
    started_at = time.monotonic()
    try:
        job.run(_lines(routes))
    finally:
        job.report.seconds = time.monotonic() - started_at
    return job.report


def _lines(routes: Sequence[Route]) -> Iterator[_Line]:
    for route in routes:
        for file, path in enumerate(route.inputs):
            for line in inputs.lines(path):
                yield _Line(route, file, line.number, line.text)


class _Job:
    """The state of one run."""

    def __init__(self, client: Client, progress: BatchProgress) -> None:
        self.report = BatchReport()
        self._progress = progress
        self._client = client
        self._unfinished: dict[str, tuple[_Line, BatchRequest]] = {}
        """By request id."""
        self._postponed: defaultdict[str, deque[tuple[_Line, BatchRequest]]]
        self._postponed = defaultdict(deque)
        """By the request id that they share with an unfinished one: ids are made of custom_ids, so
        that a request without a seed is sampled alike whatever runs beside it."""

    def run(self, lines: Iterator[_Line]) -> None:
        more = True
        while more or self._unfinished:
            while more and self._client.free_credits:
                line = next(lines, None)
                more = line is not None
                if line is not None:
                    self._start(line)
            if self._unfinished:
                completion = self._client.poll()
                if completion is not None:
                    self._finish(completion)

    def _start(self, line: _Line) -> None:
        try:
            request = self._parse(line)
        except LineError as error:
            self._fail(line, error.custom_id, f"line-{line.number}", error.status, error)
            return
        if request is None:
            self.report.skipped += 1
        elif request.submit.request_id in self._unfinished:
            self._postponed[request.submit.request_id].append((line, request))
        else:
            self._submit(line, request)

    def _submit(self, line: _Line, request: BatchRequest) -> None:
        request_id = request.submit.request_id
        try:
            self._client.submit(request.submit)
        except RequestError as error:
            self._fail(line, request.custom_id, request_id, 400, error)
        else:
            # The text is not needed any more, and there may be thousands of them.
            place = _Line(line.route, line.file, line.number, None)
            self._unfinished[request_id] = (place, request)

    def _parse(self, line: _Line) -> BatchRequest | None:
        """None when the line has its result from an earlier run. Raises LineError."""
        ledger = line.route.ledger
        try:
            if line.text is None:
                most = inputs.MAX_LINE_BYTES
                raise LineError("too_large", f"the line is longer than {most} bytes")
            request = parse_line(line.text, self._client.model_name)
            first = ledger.claim(request.custom_id, line.file, line.number)
            if first is None:
                return None
            if first != (line.file, line.number):
                of = _Line(line.route, *first, None)
                error = LineError("duplicate_custom_id", f"custom_id is that of {of} already")
                error.custom_id = request.custom_id
                raise error
        except LineError:
            if ledger.has_failed(line.label, line.number):
                return None
            raise
        return None if ledger.has_failed(line.label, line.number) else request

    def _finish(self, completion: Completion) -> None:
        request_id = completion.request_id
        line, request = self._unfinished.pop(request_id)
        if completion.error is not None:
            code = completion.error_code or "failed"
            error = RequestError(code, completion.error)
            self._fail(line, request.custom_id, request_id, _STATUS_OF_CODE.get(code, 400), error)
        else:
            self._succeed(line, request, completion)
        if postponed := self._postponed.get(request_id):
            self._submit(*postponed.popleft())
            if not postponed:
                del self._postponed[request_id]

    def _succeed(self, line: _Line, request: BatchRequest, completion: Completion) -> None:
        created, model_name = int(time.time()), self._client.model_name
        line.route.results.write(
            result_line(
                request.custom_id,
                request.form,
                completion,
                model_name=model_name,
                created=created,
            )
        )
        self.report.completed += 1
        self.report.prompt_tokens += completion.num_prompt_tokens
        self.report.output_tokens += completion.num_output_tokens
        self._progress.finished(completion.num_prompt_tokens + completion.num_output_tokens)

    def _fail(
        self, line: _Line, custom_id: str | None, request_id: str, status: int, error: RequestError
    ) -> None:
        line.route.errors.write(
            error_line(
                custom_id,
                request_id,
                status=status,
                code=error.code,
                message=str(error),
                line=line.number,
                file=line.label or None,
            )
        )
        self.report.failed += 1
        if self.report.first_error is None:
            self.report.first_error = f"{line}: {error}"
        self._progress.finished(0)
