"""Results of jobs in files, whatever is interrupted, ended or in the way."""

import gzip
import json
import os
from pathlib import Path

import pytest

from pipemax.client import Jobs
from pipemax.coordinator.journal_file import journal_path
from pipemax.proto.errors import ConfigError
from pipemax.proto.messages import ingest
from pipemax.services.batch.outputs import ResultFile
from pipemax.services.jobs import results as results_module
from pipemax.services.jobs import submit as submit_module
from pipemax.services.where import Where
from support.batch_lines import read_lines, request, write_lines
from support.job_coordinator import JobCoordinator
from support.job_lines import check_all, pipemax


def test_results_go_on_wherever_they_were_interrupted(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    write = ResultFile.write
    left = [5]

    def write_some(self: ResultFile, line: bytes) -> None:
        left[0] -= 1
        if not left[0]:
            write(self, line[:10])
            os.truncate(out, out.stat().st_size - 1)  # torn, without its line break
            raise KeyboardInterrupt
        write(self, line)

    with JobCoordinator():
        submit_module.submit_files(Where(), [source], "a")
        with results_module.source_of(Where(), None, print) as results:
            monkeypatch.setattr(ResultFile, "write", write_some)
            for count in (5, 4, 1):
                left[0] = count
                with pytest.raises(KeyboardInterrupt):
                    results_module.fetch(results, "a", out, follow=True)
            fetched = results_module.fetch(results, "a", out, follow=True)
            assert (fetched.lines, fetched.new) == (17, 10)
            check_all(read_lines(out))
            whole = out.read_bytes()
            fresh = results_module.fetch(results, "a", tmp_path / "fresh")
            assert fresh.new == 17
            assert (tmp_path / "fresh").read_bytes() == whole, "the same results, the same lines"


def test_an_output_of_something_else_is_not_appended_to(source: Path, tmp_path: Path) -> None:
    out = write_lines(tmp_path / "out", request("x"), b"")
    before = out.read_bytes()
    with JobCoordinator():
        submit_module.submit_files(Where(), [source], "a")
        submit_module.submit_files(Where(), [write_lines(tmp_path / "i", request("y"))], "b")
        with results_module.source_of(Where(), None, print) as results:
            with pytest.raises(ConfigError, match="not results of job 'a'"):
                results_module.fetch(results, "a", out)
            assert out.read_bytes() == before
            results_module.fetch(results, "a", out, overwrite=True, follow=True)
            check_all(read_lines(out))
            with pytest.raises(ConfigError, match="not results of job 'b'"):
                results_module.fetch(results, "b", out, follow=True)


def test_a_packed_output_is_made_when_the_job_is_over(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl.gz"
    with JobCoordinator() as system:
        system.paused = True
        submit_module.submit_files(Where(), [source], "a")
        with results_module.source_of(Where(), None, print) as results:
            results_module.fetch(results, "a", out)
            assert not out.exists()
            system.paused = False
            results_module.fetch(results, "a", out, follow=True)
            for _ in range(2):
                check_all(list(map(json.loads, gzip.decompress(out.read_bytes()).splitlines())))
                assert results_module.fetch(results, "a", out).lines == 17
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", "out.jsonl.gz"}


def test_results_outlive_the_system(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    with JobCoordinator(), Jobs() as jobs:
        submit_module.submit_files(Where(), [source], "a")
        while jobs.info("a").state != "finished":
            pass
    assert pipemax(monkeypatch, "jobs", "--json") == 0
    assert json.loads(capsys.readouterr().out)[0]["num_results"] == 17
    assert pipemax(monkeypatch, "results", "a", "-o", out) == 0
    check_all(read_lines(out))
    moved = tmp_path / "moved.sqlite3"
    journal_path("default").rename(moved)
    with moved.open("r+b") as file:
        file.truncate(moved.stat().st_size)
    capsys.readouterr()
    assert pipemax(monkeypatch, "results", "a", "-o", tmp_path / "again", "--journal", moved) == 0
    assert (tmp_path / "again").read_bytes() == out.read_bytes()


def test_a_job_not_made_of_lines_is_for_the_python_client(tmp_path: Path) -> None:
    with JobCoordinator(), Jobs() as jobs:
        jobs.open("mine")
        submit = ingest.Submit(request_id="x", prompt="water")
        jobs.add("mine", 0, [ingest.JobRequest(note=b"?", request=submit)])
        jobs.close_job("mine", 1)
        while not (page := jobs.results("mine")).results:
            pass
        assert page.results[0].note == b"?"
        with (
            results_module.source_of(Where(), None, print) as results,
            pytest.raises(ConfigError, match=r"with pipemax\.client\.Jobs"),
        ):
            results_module.fetch(results, "mine", tmp_path / "out")


def test_nobody_waits_for_a_job_that_is_held(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with JobCoordinator() as system:
        system.paused = True
        submit_module.submit_files(Where(), [source], "a")
        with results_module.source_of(Where(), None, print) as results:
            before = results_module.fetch(results, "a", out)
    with (
        JobCoordinator(settings="other"),
        results_module.source_of(Where(), None, print) as results,
    ):
        assert results_module.fetch(results, "a", out).job.state == "held"
        with pytest.raises(ConfigError, match="waits for a system like that which took it"):
            results_module.fetch(results, "a", out, follow=True)
    assert len(read_lines(out)) >= before.lines
    with JobCoordinator(), results_module.source_of(Where(), None, print) as results:
        results_module.fetch(results, "a", out, follow=True)
    check_all(read_lines(out))
