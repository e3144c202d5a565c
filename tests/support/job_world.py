"""`Jobs` without a coordinator: a scheduler that does as told, and a disk that can be looked at in
the middle of a transaction."""

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipemax.coordinator.events import Submitted
from pipemax.coordinator.jobs import JobLimits, Jobs
from pipemax.coordinator.journal import JournalLimits
from pipemax.proto.errors import RequestError
from pipemax.proto.messages import ingest
from pipemax.proto.messages.types import Message


def submit(text: str) -> ingest.Submit:
    return ingest.Submit(request_id=f"id-{text}", prompt=text)


def finished(submit: ingest.Submit, **fields: Any) -> ingest.Finished:
    assert submit.prompt is not None
    values: dict[str, Any] = {
        "request_id": submit.request_id,
        "token_ids": (len(submit.prompt),),
        "text": submit.prompt.upper(),
        "finish_reason": "length",
        "num_prompt_tokens": len(submit.prompt),
        "queue_s": 0.0,
        "first_token_s": 0.0,
        "total_s": 0.0,
    }
    return ingest.Finished(**{**values, **fields})


def entry(text: str) -> ingest.JobRequest:
    return ingest.JobRequest(note=text.encode(), request=submit(text))


class DeadError(Exception):
    """The coordinator died, and its disk is as `JobWorld.die` left it."""


class JobWorld:
    """One coordinator after another on one journal."""

    def __init__(
        self,
        folder: Path,
        *,
        most_running: int = 8,
        most_waiting: int = 4,
        settings: str = "s",
        journal: JournalLimits | None = None,
        poison: Callable[[str], bool] = lambda text: False,
    ) -> None:
        self._folder = folder
        folder.mkdir(mode=0o700, exist_ok=True)
        self.limits = JobLimits(
            most_running=most_running,
            most_waiting=most_waiting,
            journal=journal or JournalLimits(),
        )
        self._numbers = itertools.count(1)
        self._keys = itertools.count()
        self._poison = poison
        self.settings = settings
        self.deaths = 0
        self.most_running = 0
        self.running: dict[int, ingest.Submit] = {}
        """What the scheduler has, by key."""
        self.order: list[str] = []
        """Prompts in the order in which they were started."""
        self.path = folder / "life-0" / "journal.sqlite3"
        self.jobs = self._new()

    def _new(self) -> Jobs:
        jobs = Jobs(self.path, self.settings, "m", self.limits, self._accept)
        jobs.open()
        return jobs

    def _accept(self, job: int, request: ingest.Submit) -> Submitted:
        assert request.prompt is not None
        if request.prompt.startswith("refuse"):
            raise RequestError("too_long", "it is too long")
        if self._poison(request.prompt):
            self.die()
            raise DeadError
        key = next(self._keys)
        self.order.append(request.prompt)
        self.running[key] = request
        self.most_running = max(self.most_running, len(self.running))
        return Submitted(key, (5,), request.sampling, 0, -job)

    def call(self, kind: Callable[..., Message], **fields: Any) -> Any:
        """Says it and returns the answer."""
        (answer,) = self.round((kind, fields))
        return answer

    def round(self, *calls: tuple[Callable[..., Message], dict[str, Any]]) -> list[Any]:
        """A poll round with these messages; their answers in order."""
        for kind, fields in calls:
            self.jobs.receive(b"client", kind(number=next(self._numbers), **fields))  # type: ignore[arg-type]
        answers, unwanted = self.jobs.write(self.running)
        for key in unwanted:
            self.finish(key, finish_reason="abort")
        while self.jobs.start() is not None:
            pass
        return [answer for _, answer in answers]

    def finish(self, key: int, **fields: Any) -> None:
        self.jobs.finished(key, finished(self.running.pop(key), **fields))

    def finish_some(self, count: int) -> None:
        for key in list(self.running)[:count]:
            self.finish(key)

    def run(self) -> None:
        """Until nothing is left to do."""
        self.round()
        while self.running or self.jobs.has_work:
            self.finish_some(3)
            self.round()

    def results(self, job: str, page_at: int = 0) -> list[ingest.JobResult]:
        """All from a position on."""
        found: list[ingest.JobResult] = []
        while True:
            page = self.call(ingest.FetchResults, job=job, position=page_at + len(found))
            assert isinstance(page, ingest.JobResults), page
            assert page.position == page_at + len(found)
            if not page.results:
                return found
            found += page.results

    def die(self) -> None:
        """As `kill -9` would have it: the next life finds the files as they are now."""
        self.deaths += 1
        self.running.clear()
        old, self.path = self.path, self._folder / f"life-{self.deaths}" / self.path.name
        self.path.parent.mkdir(mode=0o700)
        for path in old.parent.glob("*"):
            shutil.copy2(path, self.path.parent)

    def live_again(self) -> None:
        """After `die`. What the dead one still did to its own copy is nobody's business."""
        self.jobs.close(clean=False)
        self.jobs = self._new()

    def kill(self) -> None:
        self.die()
        self.live_again()

    def dies_at_statement(self, count: int) -> Callable[[], bool]:
        """The disk is kept as it is before the so-manieth statement from now. Returns whether that
        has happened; then the coordinator is to be taken for dead."""
        left = itertools.count(1)
        done = []

        def trace(statement: str) -> None:
            if next(left) == count:
                done.append(True)
                self.die()

        journal = self.jobs._journal
        if journal is not None:
            journal._db.set_trace_callback(trace)
        return lambda: bool(done)

    def close(self) -> None:
        self.jobs.close(clean=True)
