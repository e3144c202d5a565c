"""`submit`, `jobs`, `results` and `cancel` against a coordinator's own jobs: every line of a file
has its line among the results, once, whatever is interrupted."""

import io
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pipemax.client import Jobs
from pipemax.client import jobs as client_jobs
from pipemax.proto.errors import ConfigError, NotRunningError
from pipemax.proto.messages import ingest
from pipemax.services.jobs import results as results_module
from pipemax.services.jobs import submit as submit_module
from pipemax.services.where import Where
from support.batch_lines import answer, read_lines, request, write_lines
from support.fake_coordinator import finished
from support.job_coordinator import JobCoordinator
from support.job_lines import check_all, pipemax


def test_from_files_to_results(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out.jsonl"
    with JobCoordinator():
        assert pipemax(monkeypatch, "submit", "-i", source) == 0
        name, said = capsys.readouterr()
        assert name.startswith("in-")
        assert "17 requests submitted" in said
        job = name.strip()
        assert pipemax(monkeypatch, "results", job, "-o", out, "--follow") == 0
        assert f"17 results in {out}, 6 of them error lines" in capsys.readouterr().out
        check_all(read_lines(out))
        assert pipemax(monkeypatch, "submit", "-i", source) == 0
        assert f"{job} was submitted before and is finished" in capsys.readouterr().err
        assert pipemax(monkeypatch, "jobs") == 0
        table = capsys.readouterr().out
        assert job in table
        assert "17 (100%)" in table
        assert pipemax(monkeypatch, "jobs", "--json") == 0
        (found,) = json.loads(capsys.readouterr().out)
        assert (found["state"], found["num_results"], found["num_failed"]) == ("finished", 17, 6)
        assert pipemax(monkeypatch, "results", job, "-o", out) == 0
        assert f"0 results in {out}; 17 were there" in capsys.readouterr().out
        assert pipemax(monkeypatch, "jobs", "--delete", job) == 0
        capsys.readouterr()
        assert pipemax(monkeypatch, "jobs", "--json") == 0
        assert json.loads(capsys.readouterr().out) == []


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("results", "ghost", "-o", "/dev/null"), "no job has the name 'ghost'"),
        (("cancel", "ghost"), "no job has the name 'ghost'"),
        (("jobs", "--delete", "ghost"), "no job has the name 'ghost'"),
        (("submit", "-i", "/no/such"), "cannot read /no/such"),
        (("submit", "-i", __file__, "--job", "a b"), "'a b' is no name of a job"),
        (("results", "ghost", "-o", "/no/such/out"), "cannot write /no/such/out"),
        (("results", "a", "-o", "x", "--journal", "/no/such"), "there is no journal /no/such"),
    ],
)
def test_what_the_user_can_correct(
    arguments: tuple[str, ...],
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with JobCoordinator():
        assert pipemax(monkeypatch, *arguments) == 2
    assert text in capsys.readouterr().err


def test_without_a_system(
    source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in (
        ("submit", "-i", source),
        ("jobs",),
        ("cancel", "a"),
        ("results", "a", "-o-"),
    ):
        assert pipemax(monkeypatch, *arguments) == 1
        assert "system 'default' is not running" in capsys.readouterr().err


def test_cancelling(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out.jsonl"
    with JobCoordinator() as system:
        system.paused = True
        assert pipemax(monkeypatch, "submit", "-i", source, "--job", "a") == 0
        assert pipemax(monkeypatch, "jobs", "--delete", "a") == 2
        assert "cancel it first" in capsys.readouterr().err
        assert pipemax(monkeypatch, "results", "a", "-o", out) == 0
        assert "a is running" in capsys.readouterr().err
        assert pipemax(monkeypatch, "cancel", "a") == 0
        assert "a is cancelled" in capsys.readouterr().out
        assert pipemax(monkeypatch, "results", "a", "-o", out, "--follow") == 0
        assert "was cancelled" in capsys.readouterr().err
    codes = {line["error"]["code"] for line in read_lines(out)}
    assert codes <= {
        "invalid_json",
        "duplicate_custom_id",
        "model_not_found",
        "invalid_field",
        "too_long",
    }


def test_an_interrupted_submit_goes_on_and_hands_nothing_over_twice(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submit_module, "_BATCH_REQUESTS", 4)
    add, calls = Jobs.add, []

    def add_some(self: Jobs, *arguments: Any) -> Any:
        calls.append(arguments[1])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return add(self, *arguments)

    with JobCoordinator():
        monkeypatch.setattr(Jobs, "add", add_some)
        with pytest.raises(KeyboardInterrupt):
            submit_module.submit_files(Where(), [source], None)
        job, before = submit_module.submit_files(Where(), [source], None)
        assert (job.num_requests, before) == (17, 8)
        assert calls == [0, 4, 8, 8, 12, 16]
        with results_module.source_of(Where(), None, print) as results:
            results_module.fetch(results, job.name, tmp_path / "out", follow=True)
    check_all(read_lines(tmp_path / "out"))


def test_other_files_do_not_become_part_of_a_job(source: Path, tmp_path: Path) -> None:
    other = write_lines(tmp_path / "other.jsonl", request("x"))
    with JobCoordinator():
        submit_module.submit_files(Where(), [source], "a")
        with pytest.raises(ConfigError, match="made of other lines"):
            submit_module.submit_files(Where(), [other], "a")
        job, _ = submit_module.submit_files(Where(), [source, other], "b")
        assert job.num_requests == 18


def test_a_message_nobody_answers_is_said_again(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_jobs, "_ASK_AGAIN_S", 0.05)
    deaf_for = Counter({ingest.OpenJob: 1, ingest.AddRequests: 1, ingest.CloseJob: 1})

    def deaf(message: object) -> bool:
        deaf_for[type(message)] -= 1  # type: ignore[index]
        return deaf_for[type(message)] >= 0  # type: ignore[index]

    with JobCoordinator(deaf=deaf) as system:
        job, _ = submit_module.submit_files(Where(), [source], "a")
        assert job.num_requests == 17
        kinds = Counter(type(message) for message in system.received)
        assert min(kinds[kind] for kind in deaf_for if kind in kinds) >= 1
        assert kinds[ingest.AddRequests] >= 2


def test_a_system_that_ends_is_noticed(source: Path) -> None:
    with JobCoordinator() as system:
        system.paused = True
        submit_module.submit_files(Where(), [source], "a")
        jobs = Jobs()
    with jobs, pytest.raises(NotRunningError, match="has ended"):
        jobs.info("a")


def test_lines_through_a_pipe(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def piped(*arguments: object) -> int:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(source.read_bytes())))
        return pipemax(monkeypatch, "submit", "-i", "-", *arguments)

    with JobCoordinator():
        assert piped() == 0
        name, said = capsys.readouterr()
        assert name.startswith("pipe-")
        assert "17 requests submitted" in said
        assert pipemax(monkeypatch, "results", name.strip(), "-o", tmp_path / "o", "--follow") == 0
        check_all(read_lines(tmp_path / "o"))
        assert piped("--job", "a") == 0
        assert piped("--job", "a") == 2, "nobody knows whether these are the same lines"
        assert "made of other lines" in capsys.readouterr().err


def test_what_failed_is_run_again_as_another_job(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    mended = []

    def answer_once_mended(submit: ingest.Submit) -> Any:
        return finished(submit) if mended else answer(submit)

    with JobCoordinator(answer=answer_once_mended):
        assert pipemax(monkeypatch, "submit", "-i", source, "--job", "night") == 0
        assert pipemax(monkeypatch, "results", "night", "-o", tmp_path / "out", "--follow") == 0
        mended.append(True)
        capsys.readouterr()
        assert pipemax(monkeypatch, "jobs", "--retry", "night") == 0
        out, err = capsys.readouterr()
        assert out == "night.retry-1\n"
        assert "2 failed requests of night" in err
        again = tmp_path / "again"
        assert pipemax(monkeypatch, "results", "night.retry-1", "-o", again, "--follow") == 0
        found = {line["custom_id"]: line["error"] for line in read_lines(again)}
        assert found == {"refused": None, "failed": None}
        for name in ("night", "night.retry-1"):
            capsys.readouterr()
            assert pipemax(monkeypatch, "jobs", "--retry", name) == 2
            assert f"{name}' has no failed requests" in capsys.readouterr().err
        assert pipemax(monkeypatch, "jobs", "--retry", "ghost") == 2
        assert pipemax(monkeypatch, "jobs", "--retry", "a", "--delete", "b") == 2


def test_old_jobs_are_deleted_and_others_kept(
    source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with JobCoordinator() as system:
        for name in ("old", "young", "unfinished"):
            system.paused = name == "unfinished"
            assert pipemax(monkeypatch, "submit", "-i", source, "--job", name) == 0
            with Jobs() as jobs:
                while jobs.info(name).state == "running" and not system.paused:
                    pass
                ended_at = jobs.info("old").ended_at
        assert ended_at is not None
        capsys.readouterr()
        monkeypatch.setattr("time.time", lambda: ended_at + 86400.0)
        assert pipemax(monkeypatch, "jobs", "--delete-older-than", "2d") == 0
        assert "0 jobs deleted" in capsys.readouterr().err
        assert pipemax(monkeypatch, "jobs", "--delete-older-than", "24h") == 0
        assert "1 jobs deleted: old" in capsys.readouterr().err
        assert pipemax(monkeypatch, "jobs", "--delete-older-than", "0s") == 0
        assert "1 jobs deleted: young" in capsys.readouterr().err
        for age in ("1", "-1d", "7 days", "d", "9" * 20 + "d"):
            assert pipemax(monkeypatch, "jobs", f"--delete-older-than={age}") == 2
        with Jobs() as jobs:
            assert [job.name for job in jobs.all()] == ["unfinished"]


def test_requests_of_a_job_may_be_given_a_time(
    source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told: list[float | None] = []

    def answer_and_tell(submit: ingest.Submit) -> Any:
        told.append(submit.timeout_s)
        return answer(submit)

    command = ("submit", "-i", source, "--job", "a", "--request-timeout")
    with JobCoordinator(answer=answer_and_tell):
        assert pipemax(monkeypatch, *command, 2.5) == 0
        with Jobs() as jobs:
            while jobs.info("a").state == "running":
                pass
        assert pipemax(monkeypatch, *command, 2.5) == 0
        assert pipemax(monkeypatch, *command, 3) == 2
        assert "another --request-timeout" in capsys.readouterr().err
        for wrong in ("0", "-1", "nan", "inf", "1e9"):
            assert pipemax(monkeypatch, *command[:-1], f"--request-timeout={wrong}") == 2
    assert set(told) == {2.5}
