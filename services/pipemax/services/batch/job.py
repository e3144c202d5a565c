"""Batch files run through a client: lines in, lines out as they finish."""

import time
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from typing import Generic, TypeVar

from pipemax.client import Client, Completion
from pipemax.proto.errors import RequestError
from pipemax.services.batch.openai_lines import BatchRequest
from pipemax.services.batch.openai_results import partial_body, result_line
from pipemax.services.batch.report import BatchProgress, BatchReport, Quiet
from pipemax.services.batch.tally import Line, Route, Tally, status_of

Place = TypeVar("Place")
_SUBMIT_SLICE_S = 0.02
"""Time after which what has finished is taken, however many more could be submitted: where lines
come slowly, results would wait for as many as there are credits."""


def run_batch(
    client: Client,
    routes: Sequence[Route],
    progress: BatchProgress | None = None,
    num_requests: int | None = None,
    request_timeout_s: float | None = None,
) -> BatchReport:
    """Runs every line of the inputs that has no result yet and writes a line for each.

    Lines are written as requests finish, so their order is not the input's: match them by
    `custom_id`. Inputs are read as fast as requests finish and never held as a whole. A bad line
    gets an error line; blank lines are skipped. `request_timeout_s` is how long each request may
    take; then it is cancelled and gets an error line with the code `timeout`.

    Raises PipemaxSystemError when the system ends meanwhile, an input cannot be read on or an
    output not be written; what was written stays.
    """
    progress = progress or Quiet()
    progress.start(num_requests)
    tally = Tally(routes, client.model_name, progress)
    started_at = time.monotonic()
    try:
        for line, request, completion in completions(client, _placed(tally, request_timeout_s)):
            _write(tally, client.model_name, line, request, completion)
    finally:
        tally.report.seconds = time.monotonic() - started_at
    return tally.report


def _placed(tally: Tally, timeout_s: float | None) -> Iterator[tuple[Line, BatchRequest]]:
    for line, request in tally.wanted():
        # The text is not needed any more, and there may be thousands of them.
        place = Line(line.route, line.file, line.number, None)
        yield place, request if timeout_s is None else request.within(timeout_s)


def _write(
    tally: Tally, model_name: str, line: Line, request: BatchRequest, completion: Completion
) -> None:
    if completion.error is not None:
        code = completion.error_code or "failed"
        error = RequestError(code, completion.error)
        form, now = request.form, int(time.time())
        body = partial_body(form, completion, model_name=model_name, created=now)
        tally.fail(line, request.custom_id, completion.request_id, status_of(code), error, body)
        return
    result = result_line(
        request.custom_id,
        request.form,
        completion,
        model_name=model_name,
        created=int(time.time()),
    )
    tally.succeed(line, result, completion.num_prompt_tokens, completion.num_output_tokens)


def completions(
    client: Client, requests: Iterator[tuple[Place, BatchRequest]]
) -> Iterator[tuple[Place, BatchRequest, Completion]]:
    """Keeps as many requests submitted as the client may, and yields each with what became of it,
    as they finish; one that is refused has a completion with its `error`. `requests` are taken as
    fast as others finish. Raises as `Client.poll`."""
    return _Stream(client, requests).run()


class _Stream(Generic[Place]):
    """The state of one run."""

    def __init__(self, client: Client, requests: Iterator[tuple[Place, BatchRequest]]) -> None:
        self._client = client
        self._requests = requests
        self._unfinished: dict[str, tuple[Place, BatchRequest]] = {}
        """By request id."""
        self._postponed: defaultdict[str, deque[tuple[Place, BatchRequest]]]
        self._postponed = defaultdict(deque)
        """By the request id that they share with an unfinished one: ids are made of custom_ids, so
        that a request without a seed is sampled alike whatever runs beside it."""

    def run(self) -> Iterator[tuple[Place, BatchRequest, Completion]]:
        more = True
        while more or self._unfinished:
            until = time.monotonic() + _SUBMIT_SLICE_S
            while more and self._client.free_credits and time.monotonic() < until:
                found = next(self._requests, None)
                more = found is not None
                if found is not None:
                    yield from self._start(*found)
            wait_s = 0.0 if more and self._client.free_credits else None
            while self._unfinished and (completion := self._client.poll(wait_s)) is not None:
                yield from self._finish(completion)
                wait_s = 0.0

    def _start(
        self, place: Place, request: BatchRequest
    ) -> Iterator[tuple[Place, BatchRequest, Completion]]:
        request_id = request.submit.request_id
        if request_id in self._unfinished:
            self._postponed[request_id].append((place, request))
            return
        try:
            self._client.submit(request.submit)
        except RequestError as error:
            yield place, request, Completion.refused(request_id, 0, error.code, str(error))
        else:
            self._unfinished[request_id] = (place, request)

    def _finish(self, completion: Completion) -> Iterator[tuple[Place, BatchRequest, Completion]]:
        request_id = completion.request_id
        yield *self._unfinished.pop(request_id), completion
        # One that is refused at once makes way for the next.
        while request_id in self._postponed and request_id not in self._unfinished:
            postponed = self._postponed[request_id]
            first = postponed.popleft()
            if not postponed:
                del self._postponed[request_id]
            yield from self._start(*first)
