"""The KV pool that is made ready while a stage imports torch."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest
from msgspec.structs import replace

from pipemax.proto.config import EngineConfig
from pipemax.proto.errors import ConfigError, ModelError
from pipemax.proto.memory import SharedMemory
from pipemax.stage_worker.early_pool import EarlyPool
from pipemax.stage_worker.model.load import load_stage_model
from support.model_zoo import build_model


@pytest.fixture
def config(tmp_path: Path) -> EngineConfig:
    return EngineConfig(
        model=str(build_model("qwen3", tmp_path / "model")),
        served_model_name="m",
        pipeline_parallel_size=2,
        layer_split=(3, 1),
        dtype="bfloat16",
        max_model_len=64,
        kv_cache_memory_bytes=2**20,
        block_size=8,
    )


@pytest.mark.parametrize("stage", [0, 1])
def test_it_fits_the_model_that_is_loaded_meanwhile(config: EngineConfig, stage: int) -> None:
    pool = EarlyPool(config, stage)
    model = load_stage_model(
        Path(config.model),
        stage=stage,
        layer_split=config.layer_split,
        dtype=config.dtype,
        block_size=config.block_size,
    )
    assert pool.geometry == model.geometry
    assert pool.num_blocks == 2**20 // model.geometry.block_bytes
    memory = pool.take()
    assert memory.size_bytes == pool.num_blocks * model.geometry.block_bytes
    memory.close()


def test_whoever_takes_it_waits_until_it_is_resident(
    config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin, done = threading.Event(), threading.Event()

    def prefault(memory: SharedMemory) -> None:
        begin.wait()
        done.set()

    monkeypatch.setattr(SharedMemory, "prefault", prefault)
    pool = EarlyPool(config, 0)  # returns at once
    assert not done.is_set()
    begin.set()
    memory = pool.take()
    assert done.is_set()
    memory.close()


def test_what_cannot_work_is_said_before_anything_is_imported(config: EngineConfig) -> None:
    with pytest.raises(ConfigError, match="--kv-cache-memory-bytes"):
        EarlyPool(replace(config, kv_cache_memory_bytes=1), 0)
    (Path(config.model) / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="safetensors"):
        EarlyPool(config, 0)


def test_it_needs_no_torch() -> None:
    code = "import sys, pipemax.stage_worker.early_pool; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
