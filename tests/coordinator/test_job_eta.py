"""ETAs of jobs: from results of late, and none where nothing is known."""

from typing import Any

from pipemax.coordinator.job_eta import MOST_JOBS, WINDOW_S, JobEta
from pipemax.proto.messages.ingest import JobInfo


def job(num_results: int, **changes: Any) -> JobInfo:
    known: dict[str, Any] = {
        "name": "night",
        "state": "running",
        "about": b"",
        "model_name": "m",
        "created_at": 0.0,
        "ended_at": None,
        "num_requests": 100,
        "num_results": num_results,
        "num_failed": 1,
        "prompt_tokens": 0,
        "output_tokens": 0,
    }
    return JobInfo(**(known | changes))


def eta_of(eta: JobEta, num_results: int, now_s: float, **changes: Any) -> float | None:
    (progress,) = eta.progress([job(num_results, **changes)], now_s)
    assert progress.num_results == num_results
    return progress.eta_s


def test_what_is_left_takes_as_long_as_what_was_done() -> None:
    eta = JobEta()
    assert eta_of(eta, 20, 0.0) is None
    assert eta_of(eta, 22, 4.0) is None  # two results say nothing
    assert eta_of(eta, 40, 10.0) == 60 * 10.0 / 20


def test_only_the_last_minutes_count() -> None:
    eta = JobEta()
    for second in range(2000):  # one result in a hundred seconds, then one a second
        done = second // 100 if second < 1500 else 15 + second - 1500
        found = eta_of(eta, done, float(second), num_requests=1000)
    assert found == (1000 - done) * 1.0
    assert len(eta._seen["night"]) <= WINDOW_S + 2


def test_held_jobs_and_new_ones_of_an_old_name_start_anew() -> None:
    eta = JobEta()
    eta_of(eta, 0, 0.0)
    assert eta_of(eta, 50, 10.0) == 10.0
    assert eta_of(eta, 3, 11.0) is None
    assert eta_of(eta, 53, 21.0) is not None
    assert eta_of(eta, 60, 22.0, state="held") is None
    assert eta_of(eta, 70, 23.0) is None


def test_few_jobs_are_followed_and_none_is_remembered_that_has_ended() -> None:
    eta = JobEta()
    many = [job(0, name=f"j{i}") for i in range(MOST_JOBS + 5)]
    assert len(eta.progress(many, 0.0)) == MOST_JOBS
    assert eta.progress([], 1.0) == ()
    assert not eta._seen
