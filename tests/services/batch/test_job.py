"""Batch files through a client: one line out for each line in, whatever the line."""

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipemax.client import Client, Submit
from pipemax.proto.errors import NotRunningError, PipemaxSystemError
from pipemax.services.batch import inputs
from pipemax.services.batch.files import BatchFiles, run_files
from pipemax.services.batch.job import completions
from pipemax.services.batch.openai_lines import BatchRequest, parse_line
from pipemax.services.batch.report import BatchReport
from support.batch_lines import answer, read_lines, request, write_lines
from support.fake_coordinator import FakeCoordinator, finished


@pytest.fixture
def client(runtime_dir: Path) -> Iterator[Client]:
    with (
        FakeCoordinator(runtime_dir / "ingest.sock", answer, credits=3) as fake,
        Client(endpoint=fake.endpoint) as client,
    ):
        yield client


def run(client: Client, tmp_path: Path, *lines: Any) -> tuple[BatchReport, list[dict[str, Any]]]:
    source = write_lines(tmp_path / "in", *lines)
    report = run_files(client, BatchFiles(inputs=(source,), outputs=(tmp_path / "out",)), {})
    return report, read_lines(tmp_path / "out")


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


def test_results_come_while_lines_come_slowly(runtime_dir: Path) -> None:
    """They do not wait until as many are submitted as may be."""
    most, given = 1000, 0
    seen: list[str] = []

    def requests() -> Iterator[tuple[int, BatchRequest]]:
        nonlocal given
        while given < most and not seen:
            line = json.dumps(request(f"id-{given}")).encode()
            yield given, parse_line(line, "fake")
            given += 1
            time.sleep(0.03)

    with (
        FakeCoordinator(runtime_dir / "ingest.sock", answer, credits=most) as fake,
        Client(endpoint=fake.endpoint) as client,
    ):
        for place, _, completion in completions(client, requests()):
            assert completion.error is None
            seen.append(f"id-{place}")
    assert given < most
    assert sorted(seen) == sorted(f"id-{n}" for n in range(given))


def test_lines_too_long_are_skipped_not_read(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "MAX_LINE_BYTES", 200)
    monkeypatch.setattr(inputs, "_READ_BYTES", 64)
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
    source = write_lines(tmp_path / "in", request("a"))
    with pytest.raises(PipemaxSystemError, match="cannot write /dev/full: No space left"):
        run_files(client, BatchFiles(inputs=(source,), outputs=(Path("/dev/full"),)), {})


def test_what_was_written_stays_when_the_system_ends(tmp_path: Path, runtime_dir: Path) -> None:
    def first_only(submit: Submit) -> Any:
        return finished(submit) if submit.prompt == "good" else None

    source = write_lines(tmp_path / "in", request("a", "good"), request("b", "never"))
    with FakeCoordinator(runtime_dir / "ingest.sock", first_only) as fake:
        client = Client(endpoint=fake.endpoint, timeout_s=0.3)
        progress = Recorder()

        def vanish() -> None:
            fake.silent = True

        progress.on_finished = vanish
        files = BatchFiles(inputs=(source,), outputs=(tmp_path / "out",))
        with client, pytest.raises(NotRunningError):
            run_files(client, files, {}, progress)
    (line,) = read_lines(tmp_path / "out")
    assert line["custom_id"] == "a"


class Recorder:
    def __init__(self) -> None:
        self.num_requests: int | None = -1
        self.tokens: list[int] = []
        self.on_finished: Any = None

    def start(self, num_requests: int | None) -> None:
        self.num_requests = num_requests

    def finished(self, num_tokens: int) -> None:
        self.tokens.append(num_tokens)
        if self.on_finished is not None:
            self.on_finished()


def test_progress_is_told(client: Client, tmp_path: Path) -> None:
    progress = Recorder()
    lines = (request("a", "ab"), b"bad", b"", request("b", "abcd"), b"\n")
    source = write_lines(tmp_path / "in", *lines)
    run_files(client, BatchFiles(inputs=(source,), outputs=(tmp_path / "out",)), {}, progress)
    assert progress.num_requests == 3  # blank lines are none
    assert sorted(progress.tokens) == [0, 4, 8]


def test_report_line() -> None:
    report = BatchReport(completed=10, failed=2, prompt_tokens=300, output_tokens=100, seconds=4.0)
    assert report.throughput == (
        "Throughput: 2.50 requests/s, 100.00 total tokens/s, 25.00 output tokens/s"
    )


def test_several_inputs_share_one_output_and_its_ids(client: Client, tmp_path: Path) -> None:
    one = write_lines(tmp_path / "one", request("a"), b"bad")
    two = write_lines(tmp_path / "two", request("b"), request("a"))
    files = BatchFiles(inputs=(one, two), outputs=(tmp_path / "out",))
    report = run_files(client, files, {})
    lines = read_lines(tmp_path / "out")
    assert {line["custom_id"] for line in lines if not line["error"]} == {"a", "b"}
    errors = {(e["error"]["file"], e["error"]["line"]): e for e in lines if e["error"]}
    assert errors[str(one), 2]["error"]["code"] == "invalid_json"
    duplicate = errors[str(two), 2]
    assert duplicate["error"]["message"] == f"custom_id is that of {one}, line 1 already"
    assert (report.completed, report.failed) == (2, 2)


def test_an_output_for_each_input(client: Client, tmp_path: Path) -> None:
    paths = [write_lines(tmp_path / name, request("a", name)) for name in ("one", "two")]
    outputs = (tmp_path / "out-one", tmp_path / "out-two")
    run_files(client, BatchFiles(inputs=tuple(paths), outputs=outputs), {})
    texts = [read_lines(path)[0]["response"]["body"]["choices"][0]["text"] for path in outputs]
    assert texts == ["ONE", "TWO"]


def test_error_lines_in_a_file_of_their_own(client: Client, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in", request("a"), b"bad", request("b", "fail"))
    errors = tmp_path / "errors"
    run_files(client, BatchFiles(inputs=(source,), outputs=(tmp_path / "out",), errors=errors), {})
    assert [line["custom_id"] for line in read_lines(tmp_path / "out")] == ["a"]
    codes = sorted(line["error"]["code"] for line in read_lines(errors))
    assert codes == ["failed", "invalid_json"]


def test_lines_that_take_too_long_keep_what_they_had_and_are_run_again(
    runtime_dir: Path, tmp_path: Path
) -> None:
    told: list[float | None] = []

    def slow(submit: Submit) -> Any:
        told.append(submit.timeout_s)
        if submit.prompt == "slow" and submit.timeout_s is not None:
            code = {"error": "too long", "error_code": "timeout"}
            return finished(submit, finish_reason="error", **code)
        return finished(submit)

    source = write_lines(tmp_path / "in", request("a"), request("b", "slow"), request("c", "none"))
    files = BatchFiles(inputs=(source,), outputs=(tmp_path / "out",))
    with (
        FakeCoordinator(runtime_dir / "ingest.sock", slow) as fake,
        Client(endpoint=fake.endpoint) as client,
    ):
        report = run_files(client, files, {}, request_timeout_s=2.5)
        assert (report.completed, report.failed) == (2, 1)
        assert told == [2.5] * 3
        lines = {line["custom_id"]: line for line in read_lines(tmp_path / "out")}
        late = lines["b"]
        assert (late["error"]["code"], late["response"]["status_code"]) == ("timeout", 408)
        assert late["response"]["body"]["choices"][0]["text"] == "SLOW"
        assert late["response"]["body"]["usage"]["completion_tokens"] == 4
        report = run_files(client, replace(files, retry_errors=True), {})
        assert (report.completed, report.failed, report.skipped) == (1, 0, 2)
    assert {line["custom_id"]: line["error"] for line in read_lines(tmp_path / "out")} == {
        "a": None,
        "b": None,
        "c": None,
    }
