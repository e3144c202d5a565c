"""What a replica makes of a batch, whatever its lines; what run-batch refuses before Ray starts."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipemax.client import Client
from pipemax.proto.errors import ConfigError, ModelError
from pipemax.ray import Replica
from pipemax.ray.batch import RayCluster, RayOptions
from pipemax.ray.replica import serve
from pipemax.services.cli.options import EngineOptions
from support.batch_lines import answer, request
from support.fake_coordinator import FakeCoordinator


@pytest.fixture
def client(runtime_dir: Path) -> Iterator[Client]:
    with (
        FakeCoordinator(runtime_dir / "ingest.sock", answer, credits=3) as fake,
        Client(endpoint=fake.endpoint) as client,
    ):
        yield client


def test_each_line_gets_its_row_in_order(client: Client) -> None:
    lines = [
        request("a", "water"),
        request("refused", "refuse"),
        request("a", "again"),
        request("failed", "fail"),
        request("b", "stone"),
        request("c", "sand"),
    ]
    texts: list[bytes | None] = [json.dumps(line).encode() for line in lines]
    results = serve(client, [b"no JSON", None, *texts])
    assert [(r.custom_id, r.status_code, r.error_code, r.text) for r in results] == [
        (None, 400, "invalid_json", None),
        (None, 400, "too_large", None),
        ("a", 200, None, "WATER"),
        ("refused", 400, "too_long", None),
        ("a", 200, None, "AGAIN"),
        ("failed", 500, "failed", None),
        ("b", 200, None, "STONE"),
        ("c", 200, None, "SAND"),
    ]
    assert (results[2].prompt_tokens, results[2].output_tokens) == (5, 5)
    whole = json.loads(results[2].result)
    assert whole["response"]["body"]["choices"][0]["text"] == "WATER"
    assert "line" not in json.loads(results[0].result)["error"]


def test_a_replica_that_cannot_start_says_why(tmp_path: Path, runtime_dir: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        Replica(str(tmp_path / "missing"))
    with pytest.raises(ConfigError, match="unknown engine options \\['pipeline'\\]"):
        Replica("m", pipeline=2)
    assert [path for path in runtime_dir.iterdir() if path.name.startswith("ray-")] == []


@pytest.mark.parametrize(
    ("options", "engine", "says"),
    [
        (RayOptions("ray://head:10001"), {}, "Ray's client is not supported"),
        (RayOptions("auto"), {"gpus": "1", "device": "cuda"}, "Ray says which GPUs"),
        (RayOptions("auto"), {"metrics_port": 9000}, "both want it"),
        (RayOptions("auto", replicas=0), {}, "--ray-replicas 0: must be at least 1"),
        (RayOptions("auto", batch_size=0), {}, "--ray-batch-size 0: must be at least 1"),
        (RayOptions("auto"), {"model": None}, "--model is missing"),
        (RayOptions("auto"), {"enforce_eager": True}, "--device cuda"),
    ],
)
def test_what_does_not_go_together(
    options: RayOptions, engine: dict[str, object], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        RayCluster(EngineOptions(**{"model": "m", **engine}), options)  # type: ignore[arg-type]


_WITHOUT_RAY = """
import sys
sys.modules["ray"] = None  # what an import finds of a package that is not there
from pipemax.services.cli import main
sys.exit(main())
"""


def test_without_ray(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(json.dumps(request("a")) + "\n")
    files = ["-i", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl")]
    command = [sys.executable, "-c", _WITHOUT_RAY, "run-batch", *files]
    done = subprocess.run(
        [*command, "--ray-address", "auto", "--model", "m"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "pip install 'pipemax[ray]'" in done.stderr
