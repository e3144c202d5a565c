"""The lines that are to run are read again as often as need be; their results are written once."""

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from pipemax.proto.errors import PipemaxSystemError
from pipemax.ray import spool as module
from pipemax.ray.batch import _Job
from pipemax.ray.sizing import Needs
from pipemax.ray.spool import Spool, read_extent
from pipemax.services.batch.outputs import ResultFile
from pipemax.services.batch.report import Quiet
from pipemax.services.batch.resume import Ledger
from pipemax.services.batch.tally import Route, Tally
from support.batch_lines import read_lines


def filled(spool: Spool, count: int, size_bytes: int = 0) -> Spool:
    for n in range(count):
        spool.add(0, 0, n + 1, f"line {n}\n".encode() + b"x" * size_bytes)
    return spool


@pytest.mark.parametrize(("rows", "sizes"), [(24, [24, 24, 12]), (1, [8] * 7 + [4]), (99, [60])])
def test_batches_hold_every_line_once(rows: int, sizes: list[int]) -> None:
    with filled(Spool(), 60) as spool:
        batches = spool.batches(rows)
        tables = [read_extent(spool.path, extent) for extent in [*batches, batches[0]]]
    assert [extent.rows for extent in batches] == [table.num_rows for table in tables[:-1]] == sizes
    assert tables[-1] == tables[0]  # read again
    found = [row for table in tables[:-1] for row in table.to_pylist()]
    assert [row["position"] for row in found] == list(range(60))
    assert [row["line"] for row in found] == [f"line {n}\n".encode() for n in range(60)]
    assert [row["number"] for row in found] == list(range(1, 61))


def test_long_lines_make_small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_BATCH_BYTES", 30_000)
    with filled(Spool(), 32, size_bytes=1000) as spool:
        assert [extent.rows for extent in spool.batches(32)] == [24, 8]


def test_another_process_reads_it_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with filled(Spool(), 3) as spool:
        (extent,) = spool.batches(8)
        assert list(tmp_path.iterdir()) == []
        code = (
            "from pipemax.ray.spool import Extent, read_extent\n"
            f"print(read_extent({spool.path!r}, {extent!r}).num_rows)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert done.stdout == b"3\n"


def test_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    spool = Spool()
    spool._file.close()
    spool._file = open("/dev/full", "wb")  # noqa: SIM115
    with pytest.raises(PipemaxSystemError, match="No space left on device; set TMPDIR"), spool:
        filled(spool, 20, size_bytes=2**20).batches(8)


def row(position: int, **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {"position": position, "route": 0, "file": 0, "number": position + 1}
    values |= {"custom_id": f"id-{position}", "status_code": 200, "error": None}
    values |= {"error_code": None, "prompt_tokens": 2, "output_tokens": 3}
    return values | {"result": f'{{"custom_id":"id-{position}"}}'} | changes


def test_a_batch_that_comes_twice_is_written_once(tmp_path: Path) -> None:
    results, ledger = ResultFile(tmp_path / "out"), Ledger()
    route = Route((tmp_path / "in",), results, results, ledger)
    tally = Tally([route], "m", Quiet())
    needs = Needs("CPU", 1)
    job = _Job(
        replica={}, model_name="m", needs=needs, replicas=1, capacity=1, batch_size=None,
        _seen=bytearray(3),
    )  # fmt: skip
    told = '{"response":{"request_id":"r","body":null}}'
    failed = row(1, error="no", error_code="too_long", status_code=400, result=told)
    written = [job._write(tally, [route], one) for one in (row(0), failed, row(9), row(0), failed)]
    results.close()
    ledger.close()
    assert written == [True, True, True, False, False]
    ids = [line["custom_id"] for line in read_lines(tmp_path / "out")]
    assert ids == ["id-0", "id-1", "id-9"]
    error = read_lines(tmp_path / "out")[1]["error"]
    assert (error["code"], error["line"]) == ("too_long", 2)
    assert (tally.report.completed, tally.report.failed) == (2, 1)
    assert tally.report.output_tokens == 6
