"""Makes batches progress, in a thread: reads their files, hands them over to the system as jobs,
and writes their results to files.

Each batch is a generator that does a little at a time, so that none waits for another. What is done
is noted when it is done; whatever stops it, the server, the system or a full disk, it begins again
with what was noted last, and nothing is run twice or lost by that.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Generator
from typing import TypeVar

import msgspec

from pipemax.client import JobInfo, Jobs
from pipemax.proto.errors import NotRunningError, PipemaxError, RequestError, WireError
from pipemax.services.batch import inputs
from pipemax.services.batch.openai_lines import LineError, parse_envelope
from pipemax.services.batch.openai_results import error_line
from pipemax.services.batch.resume import Ledger
from pipemax.services.jobs.notes import completion_of, output_line
from pipemax.services.jobs.submit import Upload, requests_of
from pipemax.services.serve.book import Batch, BatchError, Book, Counts, Status
from pipemax.services.serve.store import Draft, FileStore, new_file_id

log = logging.getLogger(__name__)
Result = TypeVar("Result")

LOOK_AGAIN_S = 0.5
"""While batches run."""
_TRY_AGAIN_S = 2.0
"""After a failure that may pass."""
_LINES_AT_ONCE = 256
MOST_ERRORS = 100
"""That a failed batch names."""
_FOR_GOOD = ("unknown_job", "other_job", "too_many_jobs", "journal_full", "closed", "gap")
"""Codes of the journal with which a batch fails; the others pass."""

Steps = Generator[bool, None, Result]
"""A little at a time. True: it got on. False: it waits for the system."""


class Worker:
    """`book` and `store` may be used beside it."""

    def __init__(self, book: Book, store: FileStore, connect: Callable[[], Jobs]) -> None:
        self._book = book
        self._store = store
        self._connect = connect
        self._jobs: Jobs | None = None
        self._not_before: dict[str, float] = {}
        """When those are tried again that did not get on."""
        self._running: dict[str, Steps[None]] = {}
        self._changed = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="batches", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Waits for it. Unfinished batches go on at the next start."""
        self._stopping = True
        self._changed.set()
        self._thread.join()

    def look(self) -> None:
        """There is a new batch, or one is to be cancelled."""
        self._changed.set()

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._changed.clear()
                wait_s = self._round()
                if wait_s is not None:
                    self._changed.wait(wait_s)
        finally:
            self._drop()
            if self._jobs is not None:
                self._jobs.close()

    def _round(self) -> float | None:
        """A little of every batch. Returns how long to wait for more; None not at all."""
        unfinished = [b.id for b in self._book.all() if not (b.has_ended and b.job_is_gone)]
        if not unfinished:
            return 3600.0
        busy = False
        now = time.monotonic()
        for batch_id in reversed(unfinished):  # oldest first
            if self._stopping:
                break
            if self._not_before.get(batch_id, now) > now:
                continue
            try:
                busy |= self._step(batch_id)
            except (NotRunningError, WireError) as error:
                log.info("batches wait: %s", error)
                self._disconnect()
                return _TRY_AGAIN_S
            except Exception as error:
                expected = isinstance(error, PipemaxError | OSError)
                log.warning("batch %s goes on later: %s", batch_id, error, exc_info=not expected)
                self._not_before[batch_id] = now + _TRY_AGAIN_S
        return None if busy else LOOK_AGAIN_S

    def _step(self, batch_id: str) -> bool:
        progress = self._running.get(batch_id)
        if progress is None:
            progress = self._running[batch_id] = self._progress(batch_id)
        try:
            return next(progress)
        except StopIteration:
            del self._running[batch_id]
            return True
        except RequestError as error:
            del self._running[batch_id]
            if error.code not in _FOR_GOOD:
                raise
            self._fail(batch_id, BatchError(code=error.code, message=str(error)))
            return True
        except BaseException:
            del self._running[batch_id]
            raise

    def _disconnect(self) -> None:
        """All begin again with what was noted."""
        self._drop()
        if self._jobs is not None:
            self._jobs.close()
            self._jobs = None

    def _drop(self) -> None:
        running, self._running = self._running, {}
        for progress in running.values():
            with contextlib.suppress(Exception):
                progress.close()

    @property
    def _connected(self) -> Jobs:
        if self._jobs is None:
            self._jobs = self._connect()
        return self._jobs

    # One batch

    def _progress(self, batch_id: str) -> Steps[None]:
        batch = self._get(batch_id)
        if batch.status == "validating":
            yield from self._validate(batch)
            if self._get(batch_id).status == "validating":
                yield from self._upload(batch)
        if not self._get(batch_id).has_ended:
            outcome = yield from self._watch(batch_id)
            yield from self._finalize(batch_id, outcome)
        if not self._get(batch_id).job_is_gone:
            self._forget(batch_id)

    def _forget(self, batch_id: str) -> None:
        """What is kept of it now is in files."""
        try:
            self._connected.cancel(batch_id)
        except RequestError as error:
            if error.code != "unknown_job":
                raise
        self._connected.delete(batch_id)
        self._book.change(batch_id, job_is_gone=True)

    def _get(self, batch_id: str) -> Batch:
        batch = self._book.get(batch_id)
        assert batch is not None
        return batch

    def _fail(self, batch_id: str, *errors: BatchError, job_is_gone: bool = False) -> None:
        self._book.change(
            batch_id,
            status="failed",
            failed_at=int(time.time()),
            errors=errors,
            job_is_gone=job_is_gone,
        )

    def _validate(self, batch: Batch) -> Steps[None]:
        """Fails the batch for lines that are none, as OpenAI does. What is wrong with a body gives
        its line an error line instead."""
        if self._store.get(batch.input_file_id) is None:
            text = f"the input file {batch.input_file_id} is not there any more"
            missing = BatchError(code="file_not_found", message=text)
            self._fail(batch.id, missing)
            return
        errors: list[BatchError] = []
        total = 0
        with contextlib.closing(Ledger()) as ledger:
            for line in inputs.lines(self._store.path(batch.input_file_id)):
                try:
                    _check_line(line, batch.endpoint, ledger)
                except LineError as error:
                    errors.append(BatchError(code=error.code, message=str(error), line=line.number))
                total += 1
                if len(errors) >= MOST_ERRORS or self._is_cancelled(batch.id):
                    break
                if total % _LINES_AT_ONCE == 0:
                    yield True
        if not total:
            errors.append(BatchError(code="empty_file", message="the input file has no lines"))
        if errors and not self._is_cancelled(batch.id):
            self._fail(batch.id, *errors, job_is_gone=True)
        elif not errors:
            self._book.count(batch.id, Counts(total=total))

    def _is_cancelled(self, batch_id: str) -> bool:
        return self._get(batch_id).status == "cancelling"

    def _upload(self, batch: Batch) -> Steps[None]:
        jobs = self._connected
        job = jobs.open(batch.id, msgspec.msgpack.encode({"batch": batch.input_file_id}))
        if job.state == "open":
            upload = Upload(jobs, job)
            path = self._store.path(batch.input_file_id)
            for number, request in enumerate(requests_of(jobs, (path,), None)):
                upload.add(request)
                if number % _LINES_AT_ONCE == 0:
                    if self._is_cancelled(batch.id):
                        return
                    yield True
            job = upload.close()
        self._note(job)
        now = int(time.time())
        self._book.change(batch.id, "validating", status="in_progress", in_progress_at=now)

    def _watch(self, batch_id: str) -> Steps[Status]:
        """Until its requests are done, or given up. Returns what became of it."""
        while True:
            batch = self._get(batch_id)
            outcome: Status | None = None
            if batch.status == "cancelling":
                outcome = "cancelled"
            elif time.time() >= batch.expires_at and batch.status == "in_progress":
                outcome = "expired"
            try:
                job = (self._connected.cancel if outcome else self._connected.info)(batch_id)
            except RequestError as error:
                if error.code != "unknown_job" or outcome != "cancelled":
                    raise
                return "cancelled"  # before it became a job
            self._note(job)
            if job.state == "finished" and batch.status != "cancelling":
                return "completed"
            if outcome is not None or job.state == "cancelled":
                return outcome or "cancelled"  # by `pipemax cancel`
            yield False

    def _note(self, job: JobInfo) -> None:
        counts = Counts(
            total=max(job.num_requests, self._get(job.name).request_counts.total),
            completed=job.num_results - job.num_failed,
            failed=job.num_failed,
        )
        self._book.count(job.name, counts)

    def _finalize(self, batch_id: str, outcome: Status) -> Steps[None]:
        """Writes its results to files, for which it gets the same ids however often this is begun
        again."""
        now = int(time.time())
        if outcome == "completed":
            self._book.change(batch_id, "in_progress", status="finalizing", finalizing_at=now)
        batch = self._get(batch_id)
        if batch.output_file_id is None or batch.error_file_id is None:
            batch = self._book.change(
                batch_id,
                output_file_id=batch.output_file_id or new_file_id(),
                error_file_id=batch.error_file_id or new_file_id(),
            )
        assert batch.output_file_id is not None
        assert batch.error_file_id is not None
        with (
            self._store.writing(batch.output_file_id) as output,
            self._store.writing(batch.error_file_id) as errors,
        ):
            counts = yield from self._write(batch, output, errors, outcome)
            for draft, kind in ((output, "output"), (errors, "error")):
                if draft.size_bytes:
                    draft.keep(f"{batch_id}_{kind}.jsonl", "batch_output")
            self._book.change(
                batch_id,
                status=outcome,
                request_counts=counts,
                output_file_id=batch.output_file_id if output.size_bytes else None,
                error_file_id=batch.error_file_id if errors.size_bytes else None,
                **{f"{outcome}_at": int(time.time())},
            )

    def _write(self, batch: Batch, output: Draft, errors: Draft, outcome: Status) -> Steps[Counts]:
        """Returns the counts."""
        done = bytearray(batch.request_counts.total)
        completed = failed = 0
        try:
            while results := (
                page := self._connected.results(batch.id, completed + failed)
            ).results:
                for result in results:
                    is_error = completion_of(result).error is not None
                    failed += is_error
                    completed += not is_error
                    (errors if is_error else output).write(output_line(page.job, result) + b"\n")
                    done[result.seq : result.seq + 1] = b"\1"
                yield True
        except RequestError as error:
            if error.code != "unknown_job" or outcome != "cancelled":
                raise
        if outcome == "expired":
            failed += yield from self._write_expired(batch, errors, done)
        return Counts(total=len(done), completed=completed, failed=failed)

    def _write_expired(self, batch: Batch, errors: Draft, done: bytearray) -> Steps[int]:
        """An error line for each request without a result. Returns how many."""
        if self._store.get(batch.input_file_id) is None:
            return 0
        count = 0
        lines = inputs.lines(self._store.path(batch.input_file_id))
        for seq, line in enumerate(lines):
            if seq >= len(done) or done[seq] or line.text is None:
                continue
            count += 1
            errors.write(
                error_line(
                    parse_envelope(line.text).custom_id,
                    f"expired-{seq}",
                    status=408,
                    code="batch_expired",
                    message=f"not finished within the completion window {batch.completion_window}",
                    line=line.number,
                )
                + b"\n"
            )
            if count % _LINES_AT_ONCE == 0:
                yield True
        return count


def _check_line(line: inputs.InputLine, endpoint: str, ledger: Ledger) -> None:
    """Raises LineError for a line with which no batch can begin."""
    if line.text is None:
        raise LineError("too_large", f"the line is longer than {inputs.MAX_LINE_BYTES} bytes")
    envelope = parse_envelope(line.text)
    if envelope.url != endpoint:
        text = f"url {envelope.url!r:.80} is not the batch's endpoint {endpoint}"
        raise LineError("mismatched_url", text)
    first = ledger.claim(envelope.custom_id, 0, line.number)
    if first != (0, line.number) and first is not None:
        text = f"custom_id {envelope.custom_id!r:.80} is that of line {first[1]} already"
        raise LineError("duplicate_custom_id", text)
