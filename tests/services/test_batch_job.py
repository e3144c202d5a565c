"""Batch files through a client: one line out for each line in, whatever the line."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipemax.client import Client, Submit
from pipemax.proto.errors import ConfigError, NotRunningError, PipemaxSystemError
from pipemax.proto.messages.ingest import Refused
from pipemax.services import batch_job
from pipemax.services.batch_job import (
    BatchReport,
    check_input,
    check_output,
    run_batch,
)

from .fake_coordinator import FakeCoordinator, finished


def request(custom_id: str, prompt: Any = "water", **body: Any) -> dict[str, Any]:
    return {
        "custom_id": custom_id,
        "method": "POST",
        "url": "/v1/completions",
        "body": {"model": "fake", "prompt": prompt, **body},
    }


def answer(submit: Submit) -> Any:
    if submit.prompt == "refuse":
        return Refused(request_id=submit.request_id, code="too_long", message="prompt is too long")
    if submit.prompt == "fail":
        return finished(submit, finish_reason="error", error="a stage is gone")
    return finished(submit)


@pytest.fixture
def client(runtime_dir: Path) -> Iterator[Client]:
    with (
        FakeCoordinator(runtime_dir / "ingest.sock", answer, credits=3) as fake,
        Client(endpoint=fake.endpoint) as client,
    ):
        yield client


def write(path: Path, *lines: Any) -> Path:
    texts = [part if isinstance(part, bytes) else json.dumps(part).encode() for part in lines]
    path.write_bytes(b"\n".join(texts))
    return path


def run(client: Client, tmp_path: Path, *lines: Any) -> tuple[BatchReport, list[dict[str, Any]]]:
    report = run_batch(client, write(tmp_path / "in", *lines), tmp_path / "out")
    return report, [json.loads(text) for text in (tmp_path / "out").read_text().splitlines()]


def test_every_request_gets_its_line(client: Client, tmp_path: Path) -> None:
    requests = [request(f"id-{n}", "w" * (n + 1)) for n in range(10)]
    report, lines = run(client, tmp_path, *requests)
    by_id = {result["custom_id"]: result for result in lines}
    assert len(lines) == len(by_id) == 10
    for n in range(10):
        body = by_id[f"id-{n}"]["response"]["body"]
        assert body["choices"][0]["text"] == "W" * (n + 1)
        assert body["model"] == "fake"
    assert (report.completed, report.failed, report.requests) == (10, 0, 10)
    assert report.prompt_tokens == report.output_tokens == 55
    assert report.seconds > 0


def test_bad_lines_get_error_lines_and_the_others_run(client: Client, tmp_path: Path) -> None:
    report, lines = run(
        client,
        tmp_path,
        b"\xef\xbb\xbf" + json.dumps(request("first")).encode(),
        b"this is not JSON",
        b"",
        request("negative", max_tokens=-5),
        request("first"),
        request("refused", "refuse"),
        request("failed", "fail"),
        b"   \r",
        request("last"),
    )
    assert [(e["custom_id"], e["error"]["code"]) for e in lines if e["error"] is not None] == [
        (None, "invalid_json"),
        ("negative", "invalid_field"),
        ("first", "duplicate_custom_id"),
        ("refused", "too_long"),
        ("failed", "failed"),
    ]
    numbers = {e["error"]["code"]: e["error"]["line"] for e in lines if e["error"]}
    assert numbers == {
        "invalid_json": 2,
        "invalid_field": 4,
        "duplicate_custom_id": 5,
        "too_long": 6,
        "failed": 7,
    }
    statuses = {e["error"]["code"]: e["response"]["status_code"] for e in lines if e["error"]}
    assert statuses.pop("failed") == 500
    assert set(statuses.values()) == {400}
    assert {e["custom_id"] for e in lines if e["error"] is None} == {"first", "last"}
    assert (report.completed, report.failed) == (2, 5)
    assert report.first_error is not None
    assert report.first_error.startswith("line 2: the line is not JSON")


def test_lines_too_long_are_skipped_not_read(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_job, "MAX_LINE_BYTES", 200)
    monkeypatch.setattr(batch_job, "_READ_BYTES", 64)
    exact = json.dumps(request("exact")).encode().ljust(200)
    report, lines = run(client, tmp_path, request("a"), b"x" * 1000, exact, b"y" * 201)
    errors = [result["error"] for result in lines if result["error"]]
    assert [(error["code"], error["line"]) for error in errors] == [
        ("too_large", 2),
        ("too_large", 4),
    ]
    assert {result["custom_id"] for result in lines if not result["error"]} == {"a", "exact"}
    assert report.failed == 2


def test_empty_input(client: Client, tmp_path: Path) -> None:
    report, lines = run(client, tmp_path)
    assert lines == []
    assert report.requests == 0
    assert report.throughput.startswith("Throughput: 0.00 requests/s")


def test_a_full_disk_ends_the_batch_with_one_line(client: Client, tmp_path: Path) -> None:
    source = write(tmp_path / "in", request("a"))
    with pytest.raises(PipemaxSystemError, match="cannot write /dev/full: No space left"):
        run_batch(client, source, Path("/dev/full"))


def test_what_was_written_stays_when_the_system_ends(tmp_path: Path, runtime_dir: Path) -> None:
    def first_only(submit: Submit) -> Any:
        return finished(submit) if submit.prompt == "good" else None

    source = write(tmp_path / "in", request("a", "good"), request("b", "never"))
    with FakeCoordinator(runtime_dir / "ingest.sock", first_only) as fake:
        client = Client(endpoint=fake.endpoint, timeout_s=0.3)
        progress = Recorder()

        def vanish() -> None:
            fake.silent = True

        progress.on_finished = vanish
        with client, pytest.raises(NotRunningError):
            run_batch(client, source, tmp_path / "out", progress)
    (line,) = (tmp_path / "out").read_text().splitlines()
    assert json.loads(line)["custom_id"] == "a"


class Recorder:
    def __init__(self) -> None:
        self.num_requests = -1
        self.tokens: list[int] = []
        self.on_finished: Any = None

    def start(self, num_requests: int) -> None:
        self.num_requests = num_requests

    def finished(self, num_tokens: int) -> None:
        self.tokens.append(num_tokens)
        if self.on_finished is not None:
            self.on_finished()


def test_progress_is_told(client: Client, tmp_path: Path) -> None:
    progress = Recorder()
    source = write(tmp_path / "in", request("a", "ab"), b"bad", b"", request("b", "abcd"), b"\n")
    run_batch(client, source, tmp_path / "out", progress)
    assert progress.num_requests == 3  # blank lines are none
    assert sorted(progress.tokens) == [0, 4, 8]


def test_report_line() -> None:
    report = BatchReport(completed=10, failed=2, prompt_tokens=300, output_tokens=100, seconds=4.0)
    assert report.throughput == (
        "Throughput: 2.50 requests/s, 100.00 total tokens/s, 25.00 output tokens/s"
    )


def test_check_input(tmp_path: Path) -> None:
    check_input(write(tmp_path / "in", request("a")))
    with pytest.raises(ConfigError, match="No such file"):
        check_input(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="directory"):
        check_input(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="not a regular file"):
        check_input(tmp_path / "pipe")


def test_check_output(tmp_path: Path) -> None:
    source = write(tmp_path / "in", request("a"))
    check_output(tmp_path / "new", source)
    assert not (tmp_path / "new").exists()
    (tmp_path / "old").write_text("kept")
    check_output(tmp_path / "old")
    assert (tmp_path / "old").read_text() == "kept"
    with pytest.raises(ConfigError, match="both input and output"):
        check_output(source, source)
    with pytest.raises(ConfigError, match="No such file"):
        check_output(tmp_path / "nowhere" / "out")
    with pytest.raises(ConfigError, match="directory"):
        check_output(tmp_path)
    with pytest.raises(ConfigError, match="cannot write"):
        check_output(Path("/proc/out.jsonl"))
