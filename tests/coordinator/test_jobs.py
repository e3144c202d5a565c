"""Durable jobs without processes: what clients are told, what runs, and deaths at every instant."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipemax.coordinator import jobs_round, journal_rows
from pipemax.proto.errors import ConfigError
from pipemax.proto.messages import ingest
from support.job_world import DeadError, JobWorld, entry


@pytest.fixture
def world(tmp_path: Path) -> Iterator[JobWorld]:
    world = JobWorld(tmp_path / "w")
    yield world
    world.close()


def fill(world: JobWorld, job: str, texts: list[str], *, close: bool = True) -> ingest.JobInfo:
    world.call(ingest.OpenJob, job=job)
    requests = tuple(map(entry, texts))
    answer = world.call(ingest.AddRequests, job=job, first_seq=0, requests=requests)
    if close:
        answer = world.call(ingest.CloseJob, job=job, num_requests=len(texts))
    (info,) = answer.jobs
    return info


def info_of(world: JobWorld, job: str) -> ingest.JobInfo:
    (info,) = world.call(ingest.ListJobs, job=job).jobs
    return info


def code_of(answer: object) -> str:
    assert isinstance(answer, ingest.JobRefused), answer
    return answer.code


def test_a_job_from_its_opening_to_its_end(world: JobWorld) -> None:
    info = fill(world, "a", ["x", "refuse", "yy"])
    assert (info.state, info.num_requests) == ("running", 3)
    world.run()
    info = info_of(world, "a")
    assert (info.state, info.num_results, info.num_failed) == ("finished", 3, 1)
    assert (info.prompt_tokens, info.output_tokens, info.model_name) == (3, 2, "m")
    assert info.ended_at is not None
    assert info.ended_at >= info.created_at > 1.6e9
    by_seq = {result.seq: result for result in world.results("a")}
    assert {seq: result.note for seq, result in by_seq.items()} == {0: b"x", 1: b"refuse", 2: b"yy"}
    refused = by_seq[1].result
    assert isinstance(refused, ingest.Refused)
    assert refused.code == "too_long"
    done = by_seq[2].result
    assert isinstance(done, ingest.Finished)
    assert done.text == "YY"


def test_without_a_job_there_is_no_file(world: JobWorld) -> None:
    assert world.call(ingest.ListJobs).jobs == ()
    assert world.call(ingest.DeleteJob, job="a").jobs == ()
    assert code_of(world.call(ingest.FetchResults, job="a", position=0)) == "unknown_job"
    world.run()
    assert not world.path.parent.exists()


def test_everything_may_be_said_twice(world: JobWorld) -> None:
    for _ in range(2):
        fill(world, "a", ["x", "y"])
        world.run()
    assert [result.seq for result in world.results("a")] == [0, 1]
    (info,) = world.call(ingest.AddRequests, job="a", first_seq=1, requests=(entry("other"),)).jobs
    assert info.num_requests == 2
    for _ in range(2):
        assert world.call(ingest.CancelJob, job="a").jobs[0].state == "finished"
    for _ in range(2):
        assert world.call(ingest.DeleteJob, job="a").jobs == ()
    assert world.call(ingest.ListJobs).jobs == ()


def test_what_cannot_be_is_refused_by_name(world: JobWorld) -> None:
    fill(world, "a", ["x", "y"], close=False)
    add, close = ingest.AddRequests, ingest.CloseJob
    assert code_of(world.call(ingest.OpenJob, job="a", about=b"else")) == "other_job"
    assert code_of(world.call(add, job="b", first_seq=0, requests=())) == "unknown_job"
    assert code_of(world.call(add, job="a", first_seq=3, requests=(entry("z"),))) == "gap"
    assert code_of(world.call(close, job="a", num_requests=3)) == "gap"
    assert code_of(world.call(ingest.DeleteJob, job="a")) == "unfinished"
    world.call(close, job="a", num_requests=2)
    assert code_of(world.call(add, job="a", first_seq=2, requests=(entry("z"),))) == "closed"
    world.run()
    assert len(world.results("a")) == 2


def test_requests_wait_in_the_journal(world: JobWorld) -> None:
    fill(world, "a", [f"r{n}" for n in range(50)])
    world.round()
    assert len(world.running) == 4, "as many as may wait in the scheduler"
    world.jobs.write([])  # the scheduler runs them all
    while world.jobs.start() is not None:
        pass
    assert len(world.running) == 8, "as many as may run"
    world.run()
    assert world.most_running <= 8
    assert world.order == [f"r{n}" for n in range(50)]


def test_jobs_take_turns(world: JobWorld) -> None:
    fill(world, "a", [f"a{n}" for n in range(40)])
    fill(world, "b", [f"b{n}" for n in range(10)])
    world.run()
    first = Counter(text[0] for text in world.order[8:24])
    assert abs(first["a"] - first["b"]) <= 4


def test_of_many_jobs_some_are_run_at_a_time(world: JobWorld) -> None:
    names = [f"job{n:02}" for n in range(40)]
    for name in names:
        fill(world, name, [f"{name}-{n}" for n in range(6)])
    world.run()
    begun = list(dict.fromkeys(text[:5] for text in world.order))
    assert begun == names, "the oldest first"
    left = Counter(dict.fromkeys(names, 6))
    for position, text in enumerate(world.order):
        left[text[:5]] -= 1
        unfinished = {t[:5] for t in world.order[:position] if left[t[:5]]}
        assert len(unfinished) <= jobs_round._JOBS_AT_ONCE
    assert sum(info.state == "finished" for info in world.call(ingest.ListJobs).jobs) == 40


def test_cancelled_requests_get_no_results_and_their_place_is_free(world: JobWorld) -> None:
    fill(world, "a", [f"r{n}" for n in range(700)])
    world.round()
    world.finish_some(2)
    used = world.jobs.totals().journal_bytes
    assert world.call(ingest.CancelJob, job="a").jobs[0].state == "cancelled"
    assert not world.running
    world.run()
    info = info_of(world, "a")
    assert (info.state, info.num_requests, info.num_results) == ("cancelled", 700, 2)
    assert len(world.results("a")) == 2
    assert world.jobs.totals().journal_bytes < used
    world.call(ingest.DeleteJob, job="a")
    world.run()
    assert world.jobs.totals().requests_finished == 0
    fill(world, "a", ["again"])
    world.run()
    assert [result.note for result in world.results("a")] == [b"again"]


def test_pages_hold_so_many_results(world: JobWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(world, "a", [f"r{n}" for n in range(300)])
    world.run()
    page = world.call(ingest.FetchResults, job="a", position=0)
    assert len(page.results) == journal_rows.PAGE_RESULTS == 256
    monkeypatch.setattr(journal_rows, "PAGE_BYTES", 1)
    page = world.call(ingest.FetchResults, job="a", position=7)
    assert len(page.results) == 1
    again = world.call(ingest.FetchResults, job="a", position=7)
    assert again.results == page.results


def test_draining_stops_what_has_not_begun_and_it_goes_on(world: JobWorld) -> None:
    fill(world, "a", [f"r{n}" for n in range(20)])
    world.round()
    begun = list(world.running)[:2]
    for key in world.jobs.drain({key for key in world.running if key not in begun}):
        world.finish(key, finish_reason="abort")
    assert not world.jobs.is_idle
    assert code_of(world.call(ingest.OpenJob, job="b")) == "draining"
    world.finish_some(2)
    world.round()
    assert world.jobs.is_idle
    assert not world.running
    assert len(world.results("a")) == 2
    world.close()
    world.live_again()
    assert world.jobs._deaths == {}, "a stop is no death"
    world.run()
    assert {result.seq for result in world.results("a")} == set(range(20))


def test_a_job_waits_for_the_model_it_was_submitted_to(world: JobWorld) -> None:
    fill(world, "a", ["x", "y"])
    world.settings = "other"
    world.kill()
    world.run()
    assert info_of(world, "a").state == "held"
    assert not world.order or world.order == ["x", "y"]
    started = len(world.order)
    fill(world, "b", ["z"])
    world.run()
    assert world.order[started:] == ["z"]
    world.settings = "s"
    world.kill()
    world.run()
    assert info_of(world, "a").state == "finished"


def test_a_disk_that_is_full_loses_nothing(
    world: JobWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipemax.coordinator.jobs._RETRY_S", 0.0)
    fill(world, "a", [f"r{n}" for n in range(30)], close=False)
    world.run()
    database = world.jobs._journal._db  # type: ignore[union-attr]
    (pages,) = database.execute("PRAGMA page_count").fetchone()
    database.execute(f"PRAGMA max_page_count = {pages}").fetchall()
    big = tuple(entry("long" * 5000) for _ in range(3))
    add = ingest.AddRequests
    assert code_of(world.call(add, job="a", first_seq=30, requests=big)) == "journal"
    assert info_of(world, "a").num_requests == 30, "reading still works"
    assert len(world.results("a")) == 30
    assert not world.jobs.has_work, "no busy waiting"
    database.execute("PRAGMA max_page_count = 100000").fetchall()
    assert world.call(add, job="a", first_seq=30, requests=big).jobs[0].num_requests == 33
    world.run()
    assert {result.seq for result in world.results("a")} == set(range(33))


def test_results_wait_for_a_disk_that_is_full(
    world: JobWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipemax.coordinator.jobs._RETRY_S", 0.0)
    fill(world, "a", [f"r{n}" for n in range(6)])
    world.round()
    database = world.jobs._journal._db  # type: ignore[union-attr]
    (pages,) = database.execute("PRAGMA page_count").fetchone()
    database.execute(f"PRAGMA max_page_count = {pages}").fetchall()
    for key in list(world.running):
        world.finish(key, text="long" * 5000)
    world.round()
    assert world.results("a") == []
    assert not world.running, "nothing more is started while results cannot be kept"
    assert world.jobs.is_idle, "and `down` does not wait for ever"
    database.execute("PRAGMA max_page_count = 100000").fetchall()
    world.run()
    assert {result.seq for result in world.results("a")} == set(range(6))


def test_a_request_that_kills_is_found_and_no_other_is_failed(tmp_path: Path) -> None:
    world = JobWorld(tmp_path, most_running=64, most_waiting=64, poison=lambda text: text == "r30")
    fill_calls = [f"r{n}" for n in range(80)]
    world.call(ingest.OpenJob, job="a")
    requests = tuple(map(entry, fill_calls))
    for _ in range(20):
        try:
            world.call(ingest.AddRequests, job="a", first_seq=0, requests=requests)
            world.call(ingest.CloseJob, job="a", num_requests=80)
            world.run()
            break
        except DeadError:
            world.live_again()
    assert world.deaths == jobs_round.MOST_DEATHS
    failed = [r for r in world.results("a") if getattr(r.result, "error", None)]
    assert [result.seq for result in failed] == [30]
    assert "5 deaths of the coordinator" in str(failed[0].result)
    assert {result.seq for result in world.results("a")} == set(range(80))
    world.close()


def test_a_journal_that_breaks_ends_the_coordinator_with_what_to_do(world: JobWorld) -> None:
    fill(world, "a", ["x"])
    world.path.write_bytes(b"x" * 100)
    world.die()
    with pytest.raises(ConfigError, match=r"cannot be used .* move it away"):
        world.live_again()


TEXTS = [f"r{n}" for n in range(24)]
ACTIONS = st.one_of(
    st.tuples(st.just("add"), st.sampled_from((0, 0, 0, -3, 1)), st.integers(1, 9)),
    st.tuples(st.just("finish"), st.integers(1, 6), st.just(0)),
    st.tuples(st.just("fetch"), st.integers(0, 10), st.just(0)),
    st.tuples(st.just("die"), st.integers(0, 20), st.just(0)),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(ACTIONS, min_size=6, max_size=30))
def test_nothing_acknowledged_is_lost_whenever_it_dies(actions: list[tuple[str, int, int]]) -> None:
    """`add` n: from the n-th on, counted from what was accepted. `die` n: the disk stays as it is
    at the n-th SQL statement from there, in the middle of a transaction or between two; whatever
    was answered until then holds afterwards."""
    with TemporaryDirectory() as folder:
        world = JobWorld(Path(folder))
        run = _Run(world)  # which ends with a death of its own
        for kind, number, count in actions:
            if kind == "die" and world.deaths < jobs_round.MOST_DEATHS - 2 and not run.is_dying():
                run.is_dying = (
                    world.dies_at_statement(number) if number else world.kill() or (lambda: False)
                )
            elif kind == "add":
                run.add(max(0, min(run.accepted, len(TEXTS) - 1) + number), count)
            elif kind == "finish":
                world.finish_some(number)
                run.round()
            elif kind == "fetch":
                run.fetch(number)
        run.finish()
        world.close()


class _Run:
    """A client that remembers what it was told."""

    def __init__(self, world: JobWorld) -> None:
        self.world = world
        self.is_dying = lambda: False
        self.accepted = 0
        self.seen: dict[int, ingest.JobResult] = {}
        self._opened = False

    def round(self, *calls: object) -> list[object]:
        """Answers of a coordinator that died meanwhile do not arrive."""
        answers = self.world.round(*calls)  # type: ignore[arg-type]
        if not self.is_dying():
            return list(answers)
        self.world.live_again()
        self.world.running.clear()
        self.is_dying = lambda: False
        self._opened = False
        return []

    def add(self, first: int, count: int) -> None:
        if not self._opened:
            self._opened = bool(self.round((ingest.OpenJob, {"job": "a"})))
        if not self._opened:
            return
        requests = tuple(map(entry, TEXTS[first : first + count]))
        fields = {"job": "a", "first_seq": first, "requests": requests}
        for answer in self.round((ingest.AddRequests, fields)):
            if isinstance(answer, ingest.JobList):
                self.accepted = max(self.accepted, answer.jobs[0].num_requests)
                assert answer.jobs[0].num_requests >= self.accepted
            else:
                assert code_of(answer) == "gap"
                assert first > self.accepted

    def fetch(self, position: int) -> None:
        for answer in self.round((ingest.FetchResults, {"job": "a", "position": position})):
            if isinstance(answer, ingest.JobResults):
                self._see(position, answer.results)
            else:
                assert not self.accepted

    def _see(self, position: int, results: tuple[ingest.JobResult, ...]) -> None:
        for place, result in enumerate(results, position):
            assert self.seen.setdefault(place, result) == result, "a result changed its place"

    def finish(self) -> None:
        self.is_dying = lambda: False
        self.world.kill()
        before = self.accepted
        for first in range(0, len(TEXTS), 9):
            self.add(first, 9)
        assert self.accepted == len(TEXTS) >= before
        self.round((ingest.CloseJob, {"job": "a", "num_requests": len(TEXTS)}))
        self.world.run()
        results = self.world.results("a")
        self._see(0, tuple(results))
        assert Counter(result.seq for result in results) == Counter(range(len(TEXTS)))
        for result in results:
            assert isinstance(result.result, ingest.Finished)
            assert result.result.text == TEXTS[result.seq].upper()
