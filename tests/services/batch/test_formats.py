"""Inputs and outputs by their suffix: what goes in comes out, whatever it is packed as."""

import gzip
import io
import json
import os
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard

from pipemax.client import Client
from pipemax.proto.errors import ConfigError
from pipemax.services.batch.files import BatchFiles, run_files
from pipemax.services.batch.inputs import STDIN, lines
from support.batch_lines import answer, request, write_lines
from support.fake_coordinator import FakeCoordinator

REQUESTS = [request(f"id-{n}", "w" * (n + 1)) for n in range(6)]
SETTINGS: dict[str, Any] = {}


@pytest.fixture
def client(runtime_dir: Path) -> Iterator[Client]:
    with (
        FakeCoordinator(runtime_dir / "ingest.sock", answer, credits=3) as fake,
        Client(endpoint=fake.endpoint) as client,
    ):
        yield client


def write(path: Path) -> Path:
    """REQUESTS as the suffix says."""
    if path.suffix == ".parquet":
        arrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(arrow.Table.from_pylist(REQUESTS), path)
        return path
    plain = write_lines(path.with_suffix(".plain"), *REQUESTS).read_bytes()
    if path.suffix == ".gz":
        half = plain.index(b"\n", len(plain) // 2) + 1
        path.write_bytes(gzip.compress(plain[:half]) + gzip.compress(plain[half:]))
    elif path.suffix == ".zst":
        pack = zstandard.ZstdCompressor().compress
        path.write_bytes(pack(plain[:100]) + pack(plain[100:]))
    else:
        path.write_bytes(plain)
    return path


def results(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        table = pytest.importorskip("pyarrow.parquet").read_table(path)
        return [json.loads(text) for text in table.column("line").to_pylist()]
    if path.suffix == ".gz":
        text = gzip.decompress(path.read_bytes())
    elif path.suffix == ".zst":
        text = zstandard.ZstdDecompressor().stream_reader(path.read_bytes()).read()
    else:
        text = path.read_bytes()
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("suffix", [".jsonl", ".gz", ".zst", ".parquet"])
def test_input(tmp_path: Path, suffix: str) -> None:
    found = [line.text for line in lines(write(tmp_path / f"in{suffix}"))]
    assert [json.loads(text or b"") for text in found] == REQUESTS


def test_a_zst_file_of_many_small_frames(tmp_path: Path) -> None:
    pack = zstandard.ZstdCompressor().compress
    path = tmp_path / "in.zst"
    path.write_bytes(b"".join(pack(b"%d\n" % n) for n in range(3000)) + pack(b""))
    assert [line.text for line in lines(path)] == [b"%d\n" % n for n in range(3000)]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_what_unpacks_to_very_much_is_read_bit_by_bit(tmp_path: Path, suffix: str) -> None:
    """128 MiB of blanks, packed into a few KiB that are read at once."""
    blanks, path = bytes(2**20).replace(b"\0", b" "), tmp_path / f"in{suffix}"
    with gzip.open(path, "wb", 1) if suffix == ".gz" else zstandard.open(path, "wb") as file:
        for _ in range(16):
            for _ in range(8):
                file.write(blanks)
            file.write(b"x\n")
    assert path.stat().st_size < 2**20
    tracemalloc.start()
    try:
        found = [(line.number, len(line.text or b"")) for line in lines(path)]
        _, most_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found == [(n, 8 * 2**20 + 2) for n in range(1, 17)]
    assert most_bytes < 80 * 2**20


def test_a_body_may_be_a_string_of_json(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    rows = [{**line, "body": json.dumps(line["body"])} for line in REQUESTS]
    path = tmp_path / "in.parquet"
    pytest.importorskip("pyarrow.parquet").write_table(arrow.Table.from_pylist(rows), path)
    assert [json.loads(line.text or b"") for line in lines(path)] == REQUESTS


def test_parquet_with_other_columns_is_refused(tmp_path: Path, client: Client) -> None:
    arrow = pytest.importorskip("pyarrow")
    path = tmp_path / "in.parquet"
    table = arrow.Table.from_pylist([{"prompt": "x"}])
    pytest.importorskip("pyarrow.parquet").write_table(table, path)
    with pytest.raises(ConfigError, match=r"has the columns \['prompt'\]"):
        BatchFiles(inputs=(path,), outputs=(tmp_path / "out",)).check()


@pytest.mark.parametrize("suffix", [".jsonl", ".gz", ".zst", ".parquet"])
def test_output_and_its_resumption(client: Client, tmp_path: Path, suffix: str) -> None:
    source, out = write(tmp_path / "in.jsonl"), tmp_path / f"out{suffix}"
    files = BatchFiles(inputs=(source,), outputs=(out,))
    files.check()
    run_files(client, files, SETTINGS)
    assert {line["custom_id"] for line in results(out)} == {f"id-{n}" for n in range(6)}
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith("out")) == [
        out.name,
        f"{out.name}.manifest.json",
    ]
    more = write_lines(tmp_path / "more", *REQUESTS, request("new", "x"), request("bad", "fail"))
    longer = BatchFiles(inputs=(more,), outputs=(out,), resume=True)
    report = run_files(client, longer, SETTINGS)
    assert (report.skipped, report.completed, report.failed) == (6, 1, 1)
    assert len(results(out)) == 8
    retry = BatchFiles(inputs=(more,), outputs=(out,), retry_errors=True)
    assert run_files(client, retry, SETTINGS).failed == 1
    assert len(results(out)) == 8


def test_columns_of_a_parquet_output(client: Client, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    source = write_lines(tmp_path / "in", request("a", "x"), request("b", "fail"))
    out = tmp_path / "out.parquet"
    run_files(client, BatchFiles(inputs=(source,), outputs=(out,)), SETTINGS)
    rows = {row.pop("custom_id"): row for row in parquet.read_table(out).to_pylist()}
    assert (rows["a"]["text"], rows["a"]["status_code"], rows["a"]["error"]) == ("X", 200, None)
    assert (rows["b"]["text"], rows["b"]["status_code"]) == (None, 500)
    assert rows["b"]["error"] == "a stage is gone"


def test_pipes(client: Client, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = write(tmp_path / "in.jsonl").read_bytes()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
    out = tmp_path / "out"
    files = BatchFiles(inputs=(STDIN,), outputs=(out,))
    files.check()
    assert run_files(client, files, SETTINGS).completed == 6
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
    with pytest.raises(ConfigError, match="holds results"):
        run_files(client, files, SETTINGS)
    again = BatchFiles(inputs=(STDIN,), outputs=(out,), resume=True)
    assert run_files(client, again, SETTINGS).skipped == 6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"inputs": ("a", "b", "a"), "outputs": ("x", "y")}, "2 output files for 3 input files"),
        ({"inputs": ("-", "-"), "outputs": ("x",)}, "give `-i -` once"),
        ({"inputs": ("a",), "outputs": ("a",)}, "a is given twice"),
        ({"inputs": ("a", "b"), "outputs": ("x", "x")}, "x is given twice"),
        ({"inputs": ("a",), "outputs": ("x",), "errors": "x"}, "x is given twice"),
        ({"inputs": ("a", "b"), "outputs": ("x", "y"), "errors": "e"}, "--error-file goes with"),
        ({"inputs": ("a",), "outputs": ("x",), "resume": True, "overwrite": True}, "--resume"),
        ({"inputs": ("nothing",), "outputs": ("x",)}, "No such file"),
        ({"inputs": ("folder",), "outputs": ("x",)}, "directory"),
        ({"inputs": ("fifo",), "outputs": ("x",)}, "not a regular file"),
        ({"inputs": ("a",), "outputs": ("nowhere/x",)}, "cannot write nowhere/x"),
    ],
)
def test_what_cannot_be_used_is_refused_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        Path(name).touch()
    Path("folder").mkdir()
    os.mkfifo("fifo")
    paths = {
        name: tuple(map(Path, value)) if isinstance(value, tuple) else Path(value)
        for name, value in settings.items()
        if name in ("inputs", "outputs", "errors")
    }
    with pytest.raises(ConfigError, match=message):
        BatchFiles(**{**settings, **paths}).check()
    assert sorted(p.name for p in Path().iterdir()) == ["a", "b", "fifo", "folder"]
