"""The command line on a GPU: what it finds, measures and chooses by itself, and that this works."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pipemax.services.gpus import look_at_gpus
from support.command import run_pipemax
from support.model_zoo import build_model

LINES = 8


def test_the_launcher_sees_the_gpus_that_torch_sees(
    rehearsal: bool, figure: Callable[..., None]
) -> None:
    if rehearsal:
        pytest.skip("there is no GPU to see")
    found = look_at_gpus()
    assert found.error is None
    assert len(found.gpus) == torch.cuda.device_count()
    for gpu in found.gpus:
        seen = torch.cuda.get_device_properties(gpu.ordinal)
        assert gpu.error is None
        assert gpu.name == seen.name
        assert gpu.compute_capability == (seen.major, seen.minor)
        assert gpu.total_bytes == pytest.approx(seen.total_memory, rel=0.02)
        assert 0 < gpu.free_bytes <= gpu.total_bytes
    figure("GPUs", len(found.gpus))


def test_a_batch_with_nothing_chosen_by_hand(
    tmp_path: Path, rehearsal: bool, figure: Callable[..., None]
) -> None:
    """Two stages, on one GPU where there is one; layers measured and shared out; random weights."""
    built = build_model("llama", tmp_path / "built", num_hidden_layers=6)
    model = tmp_path / "model"
    model.mkdir()
    shutil.copy(built / "config.json", model)
    lines, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines.write_text(
        "".join(
            json.dumps(
                {
                    "custom_id": f"line-{number}",
                    "method": "POST",
                    "url": "/v1/completions",
                    "body": {"model": "m", "prompt": [5, 6, 7 + number], "max_tokens": 8},
                }
            )
            + "\n"
            for number in range(LINES)
        )
    )
    sizes = ["--kv-cache-memory-bytes", "64MiB"] if rehearsal else ["--device", "cuda"]
    done = run_pipemax(
        "run-batch", "-i", lines, "-o", out, "--model", model, "--served-model-name", "m",
        "--load-format", "dummy", "-pp", 2, "--layer-split", "auto", "--max-num-seqs", 16,
        "--kv-offloading-size", "64MiB", *sizes, timeout_s=300.0,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in out.read_text().splitlines()]
    assert {result["custom_id"] for result in results} == {f"line-{n}" for n in range(LINES)}
    assert all(result["error"] is None for result in results)
    chosen = next(line for line in done.stderr.splitlines() if line.startswith("layer split"))
    figure("chosen", chosen.partition(":")[0])
