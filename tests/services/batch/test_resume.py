"""A batch that was stopped goes on where it was: every custom_id has its line exactly once."""

import gzip
import json
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard

from pipemax.client import Client
from pipemax.proto.errors import ConfigError, PipemaxSystemError
from pipemax.services.batch import files as batch_files
from pipemax.services.batch.files import Batch, BatchFiles, run_files
from pipemax.services.batch.outputs import repair_tail
from pipemax.services.batch.report import BatchReport
from support.batch_lines import answer, read_lines, request, write_lines
from support.fake_coordinator import FakeCoordinator

SETTINGS = {"model": "fake", "seed": 0}


@pytest.fixture
def client(runtime_dir: Path) -> Iterator[Client]:
    with (
        FakeCoordinator(runtime_dir / "ingest.sock", answer, credits=3) as fake,
        Client(endpoint=fake.endpoint) as client,
    ):
        yield client


class StoppedError(Exception):
    pass


class StopAfter:
    """Progress that ends the run with an exception after so many lines."""

    def __init__(self, count: int) -> None:
        self.left = count

    def start(self, num_requests: int | None) -> None:
        self.num_requests = num_requests

    def finished(self, num_tokens: int) -> None:
        self.left -= 1
        if not self.left:
            raise StoppedError


def many(count: int = 12) -> list[Any]:
    """Good lines, failing ones, one that is no JSON and one whose id is taken."""
    lines: list[Any] = [request(f"id-{n}", "w" * (n + 1)) for n in range(count)]
    return [*lines, request("bad-1", "fail"), b"no JSON", request("id-0"), request("bad-2", "fail")]


def files_of(tmp_path: Path, **settings: Any) -> BatchFiles:
    return BatchFiles(inputs=(tmp_path / "in",), outputs=(tmp_path / "out",), **settings)


def check_complete(lines: list[dict[str, Any]], count: int = 12) -> None:
    good = Counter(line["custom_id"] for line in lines if not line["error"])
    assert good == {f"id-{n}": 1 for n in range(count)}
    bad = Counter((line["custom_id"], line["error"]["code"]) for line in lines if line["error"])
    assert bad == {
        ("bad-1", "failed"): 1,
        (None, "invalid_json"): 1,
        ("id-0", "duplicate_custom_id"): 1,
        ("bad-2", "failed"): 1,
    }


@pytest.mark.parametrize("stops", [(1,), (5, 3), (11, 1, 1, 2), (15,)])
def test_stopped_anywhere_it_goes_on(
    client: Client, tmp_path: Path, stops: tuple[int, ...]
) -> None:
    write_lines(tmp_path / "in", *many())
    files = files_of(tmp_path)
    for count in stops:
        with pytest.raises(StoppedError):
            run_files(client, files, SETTINGS, StopAfter(count))
        client_drain(client)
    progress = StopAfter(-1)
    report = run_files(client, files, SETTINGS, progress)
    check_complete(read_lines(tmp_path / "out"))
    assert report.skipped == sum(stops) == 16 - report.requests
    assert progress.num_requests == 16 - sum(stops)
    assert Batch(files, SETTINGS).nothing_to_do
    again = run_files(client, files, SETTINGS)
    assert (again.requests, again.skipped) == (0, 0), "a finished batch is not even opened"
    check_complete(read_lines(tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out", "out.manifest.json"]


def client_drain(client: Client) -> None:
    """What a stopped run had submitted comes to nobody."""
    while client.poll(0.5) is not None:
        pass


def test_a_torn_last_line_is_run_again(client: Client, tmp_path: Path) -> None:
    write_lines(tmp_path / "in", *many())
    files = files_of(tmp_path)
    with pytest.raises(StoppedError):
        run_files(client, files, SETTINGS, StopAfter(6))
    client_drain(client)
    out = tmp_path / "out"
    whole = out.read_bytes()
    out.write_bytes(whole[:-7])
    report = run_files(client, files, SETTINGS)
    check_complete(read_lines(out))
    assert report.skipped == 5


@pytest.mark.parametrize("size", [0, 1, 5, 2**20 - 1, 2**20, 2**20 + 1, 3 * 2**20])
def test_repair_tail(tmp_path: Path, size: int) -> None:
    path = tmp_path / "out"
    path.write_bytes(b"whole\n" + b"x" * size)
    assert repair_tail(path) == size
    assert path.read_bytes() == b"whole\n"
    path.write_bytes(b"x" * size)
    assert repair_tail(path) == size
    assert path.read_bytes() == b""


def test_errors_are_retried_when_asked(client: Client, tmp_path: Path) -> None:
    write_lines(tmp_path / "in", *many())
    run_files(client, files_of(tmp_path), SETTINGS)
    report = run_files(client, files_of(tmp_path, retry_errors=True), SETTINGS)
    check_complete(read_lines(tmp_path / "out"))
    assert (report.completed, report.failed, report.skipped) == (0, 4, 12)


def test_errors_in_their_own_file_are_retried(client: Client, tmp_path: Path) -> None:
    write_lines(tmp_path / "in", *many())
    files = files_of(tmp_path, errors=tmp_path / "err")
    with pytest.raises(StoppedError):
        run_files(client, files, SETTINGS, StopAfter(14))
    client_drain(client)
    run_files(client, files, SETTINGS)
    check_complete(read_lines(tmp_path / "out") + read_lines(tmp_path / "err"))
    retry = files_of(tmp_path, errors=tmp_path / "err", retry_errors=True)
    assert run_files(client, retry, SETTINGS).failed == 4
    check_complete(read_lines(tmp_path / "out") + read_lines(tmp_path / "err"))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda path: write_lines(path / "in", request("other")), "in was another file then"),
        (lambda path: (path / "out.manifest.json").unlink(), "it has no manifest"),
    ],
)
def test_results_of_another_batch_are_not_mixed_in(
    client: Client, tmp_path: Path, change: Any, why: str
) -> None:
    write_lines(tmp_path / "in", request("a"), request("b"))
    with pytest.raises(StoppedError):
        run_files(client, files_of(tmp_path), SETTINGS, StopAfter(1))
    client_drain(client)
    before = (tmp_path / "out").read_bytes()
    change(tmp_path)
    with pytest.raises(ConfigError, match=why):
        run_files(client, files_of(tmp_path), SETTINGS)
    assert (tmp_path / "out").read_bytes() == before
    run_files(client, files_of(tmp_path, resume=True), SETTINGS)
    assert (tmp_path / "out").read_bytes().startswith(before), "asked to, it goes on by custom_id"
    report = run_files(client, files_of(tmp_path, overwrite=True), SETTINGS)
    assert len(read_lines(tmp_path / "out")) == report.completed, "asked to, it starts over"


def test_other_settings_are_named(client: Client, tmp_path: Path) -> None:
    write_lines(tmp_path / "in", request("a"))
    run_files(client, files_of(tmp_path), SETTINGS)
    with pytest.raises(ConfigError, match="seed was 0 and is 7"):
        run_files(client, files_of(tmp_path), {**SETTINGS, "seed": 7})


def test_a_damaged_manifest_is_named(client: Client, tmp_path: Path) -> None:
    write_lines(tmp_path / "in", request("a"))
    run_files(client, files_of(tmp_path), SETTINGS)
    (tmp_path / "out.manifest.json").write_text("{")
    with pytest.raises(ConfigError, match=r"out\.manifest\.json cannot be read"):
        run_files(client, files_of(tmp_path), SETTINGS)


def test_an_output_that_holds_something_else_is_left_alone(client: Client, tmp_path: Path) -> None:
    write_lines(tmp_path / "in", request("a"))
    (tmp_path / "out").write_text('{"my": "thesis"}\n')
    with pytest.raises(ConfigError, match="holds results"):
        run_files(client, files_of(tmp_path), SETTINGS)
    with pytest.raises(ConfigError, match="line 1, is no result of a batch"):
        run_files(client, files_of(tmp_path, resume=True), SETTINGS)
    assert (tmp_path / "out").read_text() == '{"my": "thesis"}\n'


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_input_that_ends_in_the_middle(client: Client, tmp_path: Path, suffix: str) -> None:
    whole = write_lines(tmp_path / "plain", *[request(f"id-{n}") for n in range(400)]).read_bytes()
    source = tmp_path / f"in{suffix}"
    pack = gzip.compress if suffix == ".gz" else zstandard.ZstdCompressor().compress
    packed = pack(whole)
    source.write_bytes(packed[: len(packed) // 2])
    files = BatchFiles(inputs=(source,), outputs=(tmp_path / "out",))
    with pytest.raises(PipemaxSystemError, match=rf"cannot read .*in\{suffix} behind line \d+"):
        run_files(client, files, SETTINGS)


def test_input_that_is_not_what_its_name_says(client: Client, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.zst", request("a"))
    with pytest.raises(PipemaxSystemError, match=r"cannot read .*in\.zst behind line 0"):
        run_files(client, BatchFiles(inputs=(source,), outputs=(tmp_path / "out",)), SETTINGS)


KILLED = """
import sys
from pathlib import Path
from pipemax.client import Client
from pipemax.services.batch.files import BatchFiles, run_files
folder = Path(sys.argv[2])
with Client(endpoint=sys.argv[1]) as client:
    run_files(client, BatchFiles(inputs=(folder / "in",), outputs=(folder / "out",)), {})
"""
LIMITED = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
"""


def test_no_room_in_the_middle_of_a_line(runtime_dir: Path, tmp_path: Path) -> None:
    """A limit on the file's size ends a write in the middle, as a full disk does."""
    write_lines(tmp_path / "in", *many())
    with FakeCoordinator(runtime_dir / "ingest.sock", answer, credits=3) as fake:
        command = [sys.executable, "-c", LIMITED + KILLED, fake.endpoint, str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert "cannot write" in done.stderr
        assert "File too large" in done.stderr
        out = (tmp_path / "out").read_bytes()
        assert len(out) == 3000
        assert not out.endswith(b"\n"), "the case this test is about"
        with Client(endpoint=fake.endpoint) as client:
            run_files(client, files_of(tmp_path), {})
    check_complete(read_lines(tmp_path / "out"))


@pytest.mark.parametrize("way", ["removed", "replaced"])
def test_an_output_that_vanishes_is_noticed(client: Client, tmp_path: Path, way: str) -> None:
    folder = tmp_path / "results"
    folder.mkdir()
    source = write_lines(tmp_path / "in", *many())
    files = BatchFiles(inputs=(source,), outputs=(folder / "out",))

    class Vanish(StopAfter):
        def finished(self, num_tokens: int) -> None:
            if self.left == 12:
                shutil.rmtree(folder)
                if way == "replaced":
                    folder.mkdir()
                    (folder / "out").touch()
            self.left -= 1

    with pytest.raises(PipemaxSystemError, match=r"cannot write .*out: No such|was replaced"):
        run_files(client, files, SETTINGS, Vanish(16))
    client_drain(client)
    folder.mkdir(exist_ok=True)
    run_files(client, files, SETTINGS)
    check_complete(read_lines(folder / "out"))


def test_two_runs_of_one_output(client: Client, tmp_path: Path) -> None:
    write_lines(tmp_path / "in", request("a"))
    with (
        Batch(files_of(tmp_path), SETTINGS).opened(),
        pytest.raises(ConfigError, match="another run writes"),
        Batch(files_of(tmp_path), SETTINGS).opened(),
    ):
        raise AssertionError
    run_files(client, files_of(tmp_path, overwrite=True), SETTINGS)


def test_killed_again_and_again(runtime_dir: Path, tmp_path: Path) -> None:
    draw = random.Random(1)
    write_lines(tmp_path / "in", *many(400))
    with FakeCoordinator(runtime_dir / "ingest.sock", answer, credits=8) as fake:
        command = [sys.executable, "-c", KILLED, fake.endpoint, str(tmp_path)]
        out = tmp_path / "out"
        killed = 0
        while True:
            size = out.stat().st_size if out.exists() else 0
            with subprocess.Popen(command) as process:
                enough = size + draw.randrange(1, 40_000)
                while process.poll() is None and (not out.exists() or out.stat().st_size < enough):
                    pass
                process.kill()
            if process.returncode == 0:
                break
            killed += 1
    assert killed >= 3
    check_complete(read_lines(out), 400)


def test_ten_thousand_ids_need_no_order(client: Client, tmp_path: Path) -> None:
    """The ledger, not the client: ids in any order, half of them there already."""
    ids = [f"id-{n}" for n in range(10_000)]
    random.Random(2).shuffle(ids)
    out = tmp_path / "out"
    out.write_text("".join(json.dumps({"custom_id": i, "error": None}) + "\n" for i in ids[:5_000]))
    ledger = batch_files.Ledger()
    ledger.load(out)
    assert ledger.finished == 5_000
    claims = [ledger.claim(i, 0, line) for line, i in enumerate(sorted(ids), 1)]
    assert claims.count(None) == 5_000
    assert all(claim in (None, (0, line)) for line, claim in enumerate(claims, 1))
    assert ledger.claim(sorted(ids)[0], 0, 10_001) == (0, 1), "its second use"
    ledger.close()


def test_report_tells_what_was_there(client: Client, tmp_path: Path) -> None:
    write_lines(tmp_path / "in", *many())
    with pytest.raises(StoppedError):
        run_files(client, files_of(tmp_path), SETTINGS, StopAfter(4))
    client_drain(client)
    report: BatchReport = run_files(client, files_of(tmp_path), SETTINGS)
    assert (report.skipped, report.completed, report.failed) == (4, 8, 4)
