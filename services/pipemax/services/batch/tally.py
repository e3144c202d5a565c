"""What a batch takes from its inputs and gives to its outputs, whoever does the work between."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipemax.proto.errors import RequestError
from pipemax.services.batch import inputs
from pipemax.services.batch.openai_lines import BatchRequest, LineError, parse_line
from pipemax.services.batch.openai_results import error_line
from pipemax.services.batch.outputs import ResultFile
from pipemax.services.batch.report import BatchProgress, BatchReport
from pipemax.services.batch.resume import Ledger

_STATUS_OF_CODE = {"failed": 500, "draining": 503, "timeout": 408}
"""HTTP's word for what is not the request's own fault; all else is 400."""


def status_of(code: str, otherwise: int = 400) -> int:
    """Of a request that was refused or failed, as HTTP would have it."""
    return _STATUS_OF_CODE.get(code, otherwise)


@dataclass(frozen=True, slots=True)
class Route:
    """Inputs and where their lines' results go."""

    inputs: tuple[Path, ...]
    results: ResultFile
    errors: ResultFile
    """May be the same file."""
    ledger: Ledger


@dataclass(frozen=True, slots=True)
class Line:
    """A line that is not blank."""

    route: Route
    file: int
    """Index among the route's inputs."""
    number: int
    text: bytes | None
    """None: too long, or not needed any more."""

    @property
    def label(self) -> str:
        """Of the file, for error lines; empty where there is only one."""
        return str(self.route.inputs[self.file]) if len(self.route.inputs) > 1 else ""

    def __str__(self) -> str:
        return f"{self.label}, line {self.number}" if self.label else f"line {self.number}"


class Tally:
    """Reads the lines that are to run, writes a line for each of them, and counts."""

    def __init__(self, routes: Sequence[Route], model_name: str, progress: BatchProgress) -> None:
        self.report = BatchReport()
        self._routes = routes
        self._model_name = model_name
        self._progress = progress

    def wanted(self) -> Iterator[tuple[Line, BatchRequest]]:
        """Each line that is to run. A bad one gets its error line on the way, one that has its
        result from an earlier run is passed over. Raises PipemaxSystemError when an input cannot be
        read on, or an output not be written."""
        for line in self._lines():
            try:
                request = self._parse(line)
            except LineError as error:
                self.fail(line, error.custom_id, f"line-{line.number}", error.status, error)
                continue
            if request is None:
                self.report.skipped += 1
            else:
                yield line, request

    def _lines(self) -> Iterator[Line]:
        for route in self._routes:
            for file, path in enumerate(route.inputs):
                for line in inputs.lines(path):
                    yield Line(route, file, line.number, line.text)

    def _parse(self, line: Line) -> BatchRequest | None:
        """None when the line has its result from an earlier run. Raises LineError."""
        ledger = line.route.ledger
        try:
            if line.text is None:
                most = inputs.MAX_LINE_BYTES
                raise LineError("too_large", f"the line is longer than {most} bytes")
            request = parse_line(line.text, self._model_name)
            first = ledger.claim(request.custom_id, line.file, line.number)
            if first is None:
                return None
            if first != (line.file, line.number):
                of = replace(line, file=first[0], number=first[1])
                error = LineError("duplicate_custom_id", f"custom_id is that of {of} already")
                error.custom_id = request.custom_id
                raise error
        except LineError:
            if ledger.has_failed(line.label, line.number):
                return None
            raise
        return None if ledger.has_failed(line.label, line.number) else request

    def succeed(self, line: Line, result: bytes, prompt_tokens: int, output_tokens: int) -> None:
        """`result` is the line's whole output line."""
        line.route.results.write(result)
        self.report.completed += 1
        self.report.prompt_tokens += prompt_tokens
        self.report.output_tokens += output_tokens
        self._progress.finished(prompt_tokens + output_tokens)

    def fail(
        self,
        line: Line,
        custom_id: str | None,
        request_id: str,
        status: int,
        error: RequestError,
        body: Mapping[str, Any] | None = None,
    ) -> None:
        """The line gets an error line; `body` is what it had produced before it failed."""
        line.route.errors.write(
            error_line(
                custom_id,
                request_id,
                status=status,
                code=error.code,
                message=str(error),
                line=line.number,
                file=line.label or None,
                body=body,
            )
        )
        self.report.failed += 1
        if self.report.first_error is None:
            self.report.first_error = f"{line}: {error}"
        self._progress.finished(0)
