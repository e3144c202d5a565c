"""Requests of jobs that failed: run again as another job's, each once; and limits of what is
kept."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from pipemax.coordinator import journal
from pipemax.coordinator.journal import JournalLimits
from pipemax.proto.messages import ingest
from support.job_world import JobWorld, entry, submit

BAD_LINE = ingest.JobRequest(
    note=b"bad", request=ingest.Refused(request_id="line-9", code="invalid_json", message="no")
)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[JobWorld]:
    world = JobWorld(tmp_path / "w")
    yield world
    world.close()


def fill(world: JobWorld, job: str, *requests: ingest.JobRequest) -> None:
    world.call(ingest.OpenJob, job=job)
    world.call(ingest.AddRequests, job=job, first_seq=0, requests=requests)
    world.call(ingest.CloseJob, job=job, num_requests=len(requests))


def run(world: JobWorld, *, fails: str = "fail") -> None:
    """Until nothing is left to do; prompts that begin with `fails` fail."""
    world.round()
    while world.running or world.jobs.has_work:
        for key, request in list(world.running.items()):
            if str(request.prompt).startswith(fails):
                world.finish(key, finish_reason="error", error="a stage is gone")
            else:
                world.finish(key)
        world.round()


def retry(world: JobWorld, job: str, name: str) -> ingest.JobInfo:
    while True:
        answer = world.call(ingest.RetryJob, job=job, retry=name)
        assert isinstance(answer, ingest.JobList), answer
        (info,) = answer.jobs
        if info.state != "open":
            return info


def code_of(answer: object) -> str:
    assert isinstance(answer, ingest.JobRefused), answer
    return answer.code


def notes(world: JobWorld, job: str) -> list[bytes]:
    return sorted(result.note for result in world.results(job))


def test_what_failed_is_run_again_and_nothing_else(world: JobWorld) -> None:
    texts = ["a", "fail-1", "refuse", "b", "fail-2"]
    fill(world, "night", *map(entry, texts), BAD_LINE)
    run(world)
    before = world.results("night")
    info = retry(world, "night", "again")
    assert (info.state, info.num_requests, info.model_name) == ("running", 3, "m")
    run(world, fails="fail-2")
    assert notes(world, "again") == [b"fail-1", b"fail-2", b"refuse"]
    results = {found.note: found.result for found in world.results("again")}
    done = results[b"fail-1"]
    assert isinstance(done, ingest.Finished)
    assert done.text == "FAIL-1"
    assert world.results("night") == before
    assert retry(world, "again", "third").num_requests == 2
    assert code_of(world.call(ingest.RetryJob, job="night", retry="more")) == "nothing_failed"


def test_what_cannot_be_run_again_is_refused_by_name(world: JobWorld) -> None:
    call = ingest.RetryJob
    fill(world, "other", entry("a"))
    fill(world, "night", entry("fail"))
    assert code_of(world.call(call, job="night", retry="again")) == "unfinished"
    assert code_of(world.call(call, job="ghost", retry="again")) == "unknown_job"
    run(world)
    assert code_of(world.call(call, job="night", retry="other")) == "other_job"
    assert code_of(world.call(call, job="night", retry="night")) == "other_job"
    assert code_of(world.call(call, job="other", retry="again")) == "nothing_failed"
    world.jobs.drain([])
    assert code_of(world.call(call, job="night", retry="again")) == "draining"


def test_a_cancelled_job_has_failed_requests_too(world: JobWorld) -> None:
    fill(world, "night", *(entry(f"fail-{n}") for n in range(20)))
    world.round()
    for key in list(world.running)[:3]:
        world.finish(key, finish_reason="error", error="x")
    world.round()
    world.call(ingest.CancelJob, job="night")
    run(world)
    assert retry(world, "night", "again").num_requests == 3


def test_many_are_moved_a_few_at_a_time_and_deaths_between_lose_none(
    world: JobWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "_RETRY_REQUESTS", 3)
    texts = [f"fail-{n:02}" for n in range(20)]
    fill(world, "night", *map(entry, texts))
    run(world)
    answers = 0
    while True:
        (info,) = world.call(ingest.RetryJob, job="night", retry="again").jobs
        answers += 1
        world.kill()
        if info.state != "open":
            break
    assert answers == 7
    (info,) = world.call(ingest.RetryJob, job="night", retry="again").jobs
    assert info.num_requests == 20
    run(world, fails="none")
    assert notes(world, "again") == [text.encode() for text in texts]
    assert notes(world, "night") == [text.encode() for text in texts]


def test_large_ones_are_moved_one_by_one(world: JobWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "_RETRY_BYTES", 10)
    fill(world, "night", *(entry(f"fail-{n}") for n in range(4)))
    run(world)
    states = []
    for _ in range(4):
        (info,) = world.call(ingest.RetryJob, job="night", retry="again").jobs
        states.append((info.num_requests, info.state))
    assert states == [(1, "open"), (2, "open"), (3, "open"), (4, "running")]


def test_a_deleted_job_gives_its_room_back(world: JobWorld) -> None:
    large = "fail" + "x" * 20_000
    fill(world, "small", entry("a"))
    fill(world, "night", *(entry(large) for _ in range(200)))
    run(world)
    held = world.jobs.totals().journal_bytes
    assert held > 4_000_000
    world.call(ingest.DeleteJob, job="night")
    run(world)
    assert world.jobs.totals().journal_bytes < 100_000
    world.jobs.close(clean=True)
    assert world.path.stat().st_size < 200_000, "the file itself"
    world.jobs = world._new()
    assert notes(world, "small") == [b"a"]


def test_limits_are_those_that_were_set(tmp_path: Path) -> None:
    world = JobWorld(tmp_path / "w", journal=JournalLimits(max_jobs=2, max_bytes=200_000))
    fill(world, "a", entry("fail"))
    run(world)
    world.call(ingest.OpenJob, job="b")
    answer = world.call(ingest.OpenJob, job="c")
    assert (code_of(answer), "larger --max-jobs" in answer.message) == ("too_many_jobs", True)
    assert code_of(world.call(ingest.RetryJob, job="a", retry="c")) == "too_many_jobs"
    many = tuple(entry("y" * 30_000) for _ in range(6))
    answer = world.call(ingest.AddRequests, job="b", first_seq=0, requests=many)
    assert (code_of(answer), "--max-journal-size" in answer.message) == ("journal_full", True)
    world.close()


def timed(text: str, timeout_s: float) -> ingest.JobRequest:
    return ingest.JobRequest(note=text.encode(), request=replace(submit(text), timeout_s=timeout_s))


@pytest.mark.parametrize("clean", [False, True])
def test_time_runs_on_when_the_coordinator_dies_and_anew_after_a_stop(
    world: JobWorld, monkeypatch: pytest.MonkeyPatch, clean: bool
) -> None:
    started_at = time.time()
    fill(world, "night", timed("long", 5000.0), timed("short", 60.0))
    assert [request.timeout_s for request in world.running.values()] == [5000.0, 60.0]
    monkeypatch.setattr(time, "time", lambda: started_at + 1000)
    if clean:
        world.jobs.close(clean=True)
        world.running.clear()
        world.jobs = world._new()
    else:
        world.kill()
    world.round()
    left = {request.prompt: request.timeout_s for request in world.running.values()}
    if clean:
        assert left == {"long": 5000.0, "short": 60.0}
        return
    assert set(left) == {"long"}
    assert left["long"] == pytest.approx(4000, abs=60)
    monkeypatch.setattr(time, "time", lambda: started_at + 2000)
    world.kill()
    world.round()
    assert [r.timeout_s for r in world.running.values()] == [pytest.approx(3000, abs=60)]
    run(world)
    results = {found.note: found.result for found in world.results("night")}
    late = results[b"short"]
    assert isinstance(late, ingest.Finished)
    assert (late.finish_reason, late.error_code) == ("error", "timeout")
    assert retry(world, "night", "again").num_requests == 1
