"""`run-batch --ray-address`: on nodes that come and go, what one machine gives.

Part of `make test-full`, where Ray is installed: `pip install 'pipemax[ray]'`.
"""

import importlib.util
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pipemax.services.tiny_model import make_demo_model
from support.batch_lines import read_lines, write_lines
from support.command import eventually, run_pipemax
from support.ray_nodes import RayNodes

pytestmark = [
    pytest.mark.full,
    pytest.mark.timeout(900),
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed"),
]

ENGINE = ("--served-model-name", "demo", "--dtype", "float32", "--max-num-seqs", 16,
          "--kv-cache-memory-bytes", "512KiB", "--kv-offloading-size", "32MiB",
          "--warm-up-s", 0.1, "--threads-per-stage", 1)  # fmt: skip
NUM_REQUESTS = 600
PATIENCE_S = 800.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_demo_model(tmp_path_factory.mktemp("demo"))


def requests(count: int) -> list[dict[str, Any]]:
    chance = random.Random(count)
    lines = []
    for n in range(count):
        prompt = [chance.randrange(10, 900) for _ in range(chance.randrange(5, 40))]
        body = {"model": "demo", "prompt": prompt, "max_tokens": chance.randrange(8, 40)}
        request = {"custom_id": f"id-{n}", "method": "POST", "url": "/v1/completions"}
        lines.append(request | {"body": body | {"temperature": 0}})
    return lines


def outputs(path: Path) -> dict[str, Any]:
    """Choices by id. Raises AssertionError for a line that failed, and for an id that is there
    twice."""
    found: dict[str, Any] = {}
    for line in read_lines(path):
        assert line["error"] is None, line
        assert line["custom_id"] not in found, f"{line['custom_id']} is there twice"
        found[line["custom_id"]] = json.dumps(line["response"]["body"]["choices"])
    return found


def replicas() -> set[str]:
    """Systems with a live process, by the run directory on its command line."""
    root = os.environ["PIPEMAX_RUNTIME_DIR"]
    names = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        names |= {Path(word).name for word in words if word.startswith(f"{root}/ray-")}
    return names


def test_a_node_is_lost_midway(model: Path, tmp_path: Path) -> None:
    """Nodes have room for one replica each, so that what was lost has to wait for room."""
    source = write_lines(tmp_path / "in.jsonl", *requests(NUM_REQUESTS))
    out = tmp_path / "out.jsonl"
    command = ["run-batch", "--model", model, *ENGINE, "-i", source]
    with RayNodes(3) as nodes:
        words = [*map(str, command), "-o", str(out), "--ray-address", nodes.address]
        job = subprocess.Popen(
            [sys.executable, "-m", "pipemax", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started_at = time.monotonic()

        def lines_out() -> int:
            return out.read_bytes().count(b"\n") if out.exists() else 0

        assert eventually(
            lambda: job.poll() is not None or lines_out() >= NUM_REQUESTS // 3, PATIENCE_S
        )
        before, systems = lines_out(), replicas()
        assert job.poll() is None, job.communicate()[0]
        assert len(systems) == 3
        nodes.remove_one()
        assert eventually(lambda: len(systems & replicas()) == 2, 30), "a lost replica lives on"
        said = job.communicate(timeout=PATIENCE_S)[0]
        seconds = time.monotonic() - started_at
    assert job.returncode == 0, said
    found = outputs(out)
    assert len(found) == NUM_REQUESTS
    assert before < NUM_REQUESTS, "nothing was left to do when the node was lost"
    plain = tmp_path / "plain.jsonl"
    run_pipemax(*command, "-o", plain, timeout_s=PATIENCE_S)
    assert found == outputs(plain)
    assert replicas() == set()
    sys.stdout.write(f"{before} requests before, {NUM_REQUESTS - before} after; {seconds:.0f} s\n")


def test_one_machine(model: Path, tmp_path: Path) -> None:
    """Bad lines, several files, and a second run that goes on and one that has nothing to do."""
    first, second = requests(20), requests(30)
    one = write_lines(tmp_path / "one.jsonl", *first[:10], b"no JSON", first[3])
    too_long = second[20] | {"body": second[20]["body"] | {"prompt": [5] * 3000}}
    two = write_lines(tmp_path / "two.jsonl", too_long, *second[21:])
    out = tmp_path / "out.parquet"
    command = ["run-batch", "--model", model, *ENGINE, "-i", one, "-i", two, "-o", out]
    done = run_pipemax(*command, "--ray-address", "local", timeout_s=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    import pyarrow.parquet

    rows = pyarrow.parquet.read_table(out).to_pylist()
    lines = [json.loads(row["line"]) for row in rows]
    served = {line["custom_id"] for line in lines if line["error"] is None}
    assert served == {line["custom_id"] for line in [*first[:10], *second[21:]]}
    errors = [(e["custom_id"], e["error"]) for e in lines if e["error"] is not None]
    places = {(name, e["code"], Path(e["file"]).name, e["line"]) for name, e in errors}
    assert places == {
        (None, "invalid_json", "one.jsonl", 11),
        ("id-3", "duplicate_custom_id", "one.jsonl", 12),
        ("id-20", "too_long", "two.jsonl", 1),
    }
    again = run_pipemax(*command, "--ray-address", "local")
    assert "every line has its result already" in again.stderr
    retried = run_pipemax(*command, "--retry-errors", timeout_s=PATIENCE_S)  # without Ray
    assert "3 results" in retried.stdout, retried.stderr
    assert "19 were there before" in retried.stdout


def test_a_replica_that_cannot_start(model: Path, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", *requests(3))
    command = ["run-batch", "--model", model, *ENGINE, "-i", source, "-o", tmp_path / "out.jsonl"]
    refused = ("--max-model-len", 99999, "--ray-address", "local")
    done = run_pipemax(*command, *refused, timeout_s=PATIENCE_S)
    assert done.returncode == 1
    assert "a replica failed: --max-model-len 99999" in done.stderr.splitlines()[-1]
