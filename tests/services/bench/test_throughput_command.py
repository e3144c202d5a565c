"""`pipemax bench throughput` as it is run: real processes on the CPU, a tiny model."""

import json
from pathlib import Path

import pytest

from pipemax.proto.errors import ConfigError
from pipemax.services.bench.command import run_throughput
from pipemax.services.bench.model import SHAPE_121M
from pipemax.services.cli.bench_flags import ThroughputFlags
from pipemax.services.tiny_model import ModelShape, _tensors, make_demo_model
from support.command import run_pipemax


def test_a_tiny_run(tmp_path: Path) -> None:
    shape = ModelShape(num_layers=2, hidden_size=64, intermediate_size=96, num_heads=4)
    model = make_demo_model(tmp_path / "model", shape=shape)
    requests = [
        {"prompt_token_ids": list(range(300, 305 + n)), "output_tokens": 3 + n} for n in range(4)
    ]
    data = tmp_path / "work.jsonl"
    data.write_text("".join(json.dumps(request) + "\n" for request in requests))
    done = run_pipemax(
        *("bench", "throughput", "--json", "--output-json", tmp_path / "out.json"),
        *("--model", model, "--dataset-name", "jsonl", "--dataset-path", data),
        *("--kv-cache-memory-bytes", "1MiB", "--kv-offloading-size", "0", "--warm-up-s", "0"),
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found == json.loads((tmp_path / "out.json").read_text())
    assert found["num_requests"] == 4
    assert found["num_prompt_tokens"] == sum(len(one["prompt_token_ids"]) for one in requests)
    assert found["num_output_tokens"] == 3 + 4 + 5 + 6
    assert found["requests_per_second"] == pytest.approx(4 / found["elapsed_time"])
    assert found["versions"]["pipemax"]
    assert found["dataset"]["dataset_name"] == "jsonl"


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    path = tmp_path / "w.jsonl"
    path.write_text('{"prompt_token_ids": [1, 2, 3], "output_tokens": 4000}\n')
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_demo_model(tmp_path / "model", shape=ModelShape(num_layers=1))


def test_rounds_of_the_same_prompts_need_the_prefix_cache_off(lines: Path, model: Path) -> None:
    flags = ThroughputFlags(
        model=str(model), dataset_name="jsonl", dataset_path=lines, rounds=2, num_prompts=1
    )
    with pytest.raises(ConfigError, match="--no-enable-prefix-caching"):
        run_throughput(flags, as_json=False, output_json=None)


def test_a_request_that_is_too_long_is_refused_before_anything_starts(
    lines: Path, model: Path
) -> None:
    flags = ThroughputFlags(
        model=str(model), dataset_name="jsonl", dataset_path=lines, kv_offloading_size="0"
    )
    with pytest.raises(ConfigError, match="has 4003 tokens, and the system holds 2048"):
        run_throughput(flags, as_json=False, output_json=None)


def test_the_model_that_is_made_has_121_million_parameters() -> None:
    sizes = (dims for _, dims, _ in _tensors(SHAPE_121M))
    count = sum(dims[0] * (dims[1] if len(dims) == 2 else 1) for dims in sizes)
    assert 121_000_000 < count < 122_000_000
