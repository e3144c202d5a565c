"""How large the KV pool of a stage on a GPU becomes."""

import logging
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipemax.proto.errors import ConfigError
from pipemax.proto.messages.types import unpack_i32
from pipemax.stage_worker.attention.device import select
from pipemax.stage_worker.devices.cuda.graphs import bucket_rows
from pipemax.stage_worker.devices.cuda.memory import (
    CONTEXT_BYTES,
    MemoryUse,
    blocks_left,
    largest_step,
)
from pipemax.stage_worker.plan_columns import read_columns
from support.cuda_stage import open_stage, simulated, stage_config
from support.fake_cuda.attention import RecordableBackend
from support.model_zoo import build_model

MIB, GIB = 2**20, 2**30


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model("llama", tmp_path_factory.mktemp("model") / "llama")


def use(**changes: int) -> MemoryUse:
    values = {
        "total_bytes": 24 * GIB,
        "stages": 1,
        "weights_bytes": 15 * GIB,
        "step_bytes": 2 * GIB,
        "buffer_bytes": 256 * MIB,
        "graph_bytes": 512 * MIB,
        "context_bytes": 256 * MIB,
    }
    return MemoryUse(utilization=0.9, **{**values, **changes})


def test_the_pool_is_what_the_rest_leaves() -> None:
    left = int(0.9 * 24 * GIB) - 18 * GIB
    assert use().pool_bytes == left
    assert blocks_left(use(), 2 * MIB, 64, 0) == left // (2 * MIB)
    two = use(stages=2, weights_bytes=7 * GIB, step_bytes=GIB)
    assert two.pool_bytes == int(0.9 * 24 * GIB) // 2 - 9 * GIB


def test_no_room_for_one_request_names_flags_and_sizes() -> None:
    with pytest.raises(ConfigError) as caught:
        blocks_left(use(weights_bytes=20 * GIB), 2 * MIB, 2048, 3)
    said = str(caught.value)
    for part in (
        *("stage 3", "2048 blocks, 4.0 GiB", "--gpu-memory-utilization 90% of 24.0 GiB"),
        *("weights 20.0 GiB", "the largest step 2.0 GiB", "CUDA graphs 512.0 MiB", "leaves 0 B"),
        *("--max-model-len", "--max-num-seqs", "--max-num-batched-tokens"),
    ):
        assert part in said


@given(st.integers(1, 4096), st.integers(1, 512), st.integers(1, 512), st.sampled_from([1, 8, 16]))
def test_the_largest_step_is_a_step_of_full_size(
    tokens: int, seqs: int, longest: int, block_size: int
) -> None:
    plan = largest_step(tokens, seqs, longest, block_size)
    columns = read_columns(plan, block_size)
    counts = unpack_i32(plan.num_tokens)
    assert len(counts) == len(plan.sample) == min(seqs, tokens)
    assert sum(counts) == tokens or max(counts) == longest
    assert max(counts) <= longest
    assert columns.max_block < -(-min(longest, tokens) // block_size)


@given(st.integers(1, 600))
def test_every_batch_has_a_graph_with_little_padding(most: int) -> None:
    sizes = bucket_rows(most)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == most
    for rows in range(1, most + 1):
        fits = next(size for size in sizes if size >= rows)
        assert fits - rows < 8


def test_a_pool_by_utilization_fills_its_share(
    model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Of a small GPU, whose context costs nothing: the pool and the stage's own buffers."""
    monkeypatch.setattr(select, "ReferenceBackend", RecordableBackend)
    config = stage_config(model_dir, cuda={"gpu_memory_utilization": 0.5})
    config = msgspec.structs.replace(config, kv_cache_memory_bytes=None)
    caplog.set_level(logging.INFO)
    with simulated(tmp_path / "gpu", gpu_bytes=128 * MIB) as process:
        with open_stage(config) as engine:
            held = process.machine.held_bytes(0)
            pool_bytes = engine.num_blocks * engine.block_bytes
        process.close()
    others = 6 * MIB  # what the simulated torch says that it held at most
    assert 64 * MIB - engine.block_bytes - 2 * MIB < held + others <= 64 * MIB + 2 * MIB
    assert pool_bytes > 16 * MIB
    assert "KV pool: 50% of 128.0 MiB, less weights" in caplog.text
    assert "4 CUDA graphs for 1 to 8 requests" in caplog.text


def test_a_gpu_that_is_too_small_is_refused_before_any_work(
    model_dir: Path, tmp_path: Path
) -> None:
    """Two stages on one GPU: each is expected to have a context of its own."""
    config = stage_config(model_dir, gpus=(0, 0), cuda={"gpu_memory_utilization": 0.9})
    config = msgspec.structs.replace(config, kv_cache_memory_bytes=None)
    assert CONTEXT_BYTES > 256 * MIB
    with simulated(tmp_path / "gpu", gpu_bytes=256 * MIB) as process:
        with (
            pytest.raises(ConfigError, match="no room for the KV of one request"),
            open_stage(config),
        ):
            pass
        assert process.machine.held_bytes(0) == 0
        process.close()


def test_the_sweep_is_timed_by_the_gpu(model_dir: Path, tmp_path: Path) -> None:
    config = stage_config(model_dir, gpus=(0, 0))
    for stage in range(2):
        with simulated(tmp_path / f"gpu{stage}") as process:
            with open_stage(config, stage) as engine:
                held = process.machine.held_bytes(0)
                assert engine.sweep(0) == ()
                samples = engine.sweep(0.2)
                assert process.machine.held_bytes(0) == held
            process.close()
        assert len(samples) >= 2
        assert all(sample.compute_s > 0 for sample in samples)
        assert any(sample.decode_requests for sample in samples)
