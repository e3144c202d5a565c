"""What `--device cuda` makes of the GPUs that are there, and what it refuses by name."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipemax.proto.config import CudaDevice, EngineConfig
from pipemax.proto.errors import ConfigError
from pipemax.services import cuda_config
from pipemax.services.cli.options import EngineOptions
from pipemax.services.engine_config import build_config
from pipemax.services.layer_split import Split, StageRoom
from pipemax.services.measured_split import StageDevice
from pipemax.stage_worker.layer_costs import ModelCosts, PartCost

from .test_gpus import gpu

GIB = 2**30
LAYERS, HIDDEN, VOCAB = 32, 4096, 128_256
TOKEN_BYTES = 2 * 8 * 128 * 2
"""On one layer."""
NAMES = ("Simulated GPU",) * 2


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The shape of an 8B Llama; nothing else."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": LAYERS,
        "max_position_embeddings": 131_072,
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 14_336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "dtype": "bfloat16",
        "tie_word_embeddings": False,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


class Build:
    """`build_config` on a machine with these GPUs, and what it told."""

    def __init__(self, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.model = model
        self.patch = monkeypatch
        self.told: list[str] = []
        self.gpus(4)
        self.host(256 * GIB)

    def gpus(self, count: int, **changes: Any) -> None:
        found = tuple(gpu(ordinal, **changes) for ordinal in range(count))
        self.patch.setattr(cuda_config, "find_gpus", lambda: found)

    def host(self, size_bytes: int, available: int | None = None) -> None:
        self.patch.setattr(cuda_config, "memory_bytes", lambda: size_bytes)
        self.patch.setattr(cuda_config, "available_memory_bytes", lambda: available or size_bytes)

    def __call__(self, **changes: Any) -> EngineConfig:
        options = EngineOptions(
            model=str(self.model),
            device="cuda",
            load_format="dummy",
            layer_split="even",
            pipeline_parallel_size=2,
        )
        return build_config(replace(options, **changes), "test", self.told.append)


@pytest.fixture
def build(model: Path, monkeypatch: pytest.MonkeyPatch) -> Build:
    return Build(model, monkeypatch)


def test_defaults(build: Build) -> None:
    config = build()
    assert config.device == "cuda"
    assert config.cuda == CudaDevice(
        gpus=(0, 1), names=NAMES, block_bytes=(16 * 16 * TOKEN_BYTES,) * 2
    )
    assert config.layer_split == (16, 16)
    assert config.block_size == 16
    assert config.kv_cache_memory_bytes is None
    assert config.activation_transport == "auto"
    assert config.threads_per_stage == 1
    assert config.kv_offloading_bytes == 2 * 2 * 24 * 10**9 // 2**20 * 2**20
    assert build.told == ["host pool 89.4 GiB, pinned; --kv-offloading-size changes it"]


def test_every_flag_reaches_the_configuration(build: Build) -> None:
    config = build(
        gpus="3,1",
        gpu_memory_utilization=0.8,
        attention_backend="triton",
        enforce_eager=True,
        kv_copies="daemon",
        activation_transport="ipc",
        threads_per_stage=3,
        block_size=32,
        kv_offloading_size="3GiB",
        max_model_len=1000,
        layer_split="20,12",
    )
    assert config.cuda == CudaDevice(
        gpus=(3, 1),
        names=NAMES,
        block_bytes=(20 * 32 * TOKEN_BYTES, 12 * 32 * TOKEN_BYTES),
        gpu_memory_utilization=0.8,
        attention_backend="triton",
        enforce_eager=True,
        kv_copies="daemon",
    )
    assert config.activation_transport == "ipc"
    assert config.threads_per_stage == 3
    assert config.block_size == 32
    assert config.kv_offloading_bytes == 3 * GIB
    assert config.max_model_len == 1000
    assert build(activation_transport="tcp").activation_transport == "tcp"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gpus": "4"}, "--gpus 4: there is no GPU 4; this machine shows 0 Simulated GPU"),
        ({"gpu_memory_utilization": 0.0}, "--gpu-memory-utilization 0.0: expected float > 0"),
        ({"gpu_memory_utilization": 1.5}, "--gpu-memory-utilization 1.5: expected float <= 1"),
        (
            {"gpu_memory_utilization": 0.5, "kv_cache_memory_bytes": "1GiB"},
            "both size the KV pool; give one",
        ),
        (
            {"attention_backend": "sdpa"},
            "--attention-backend sdpa: choose auto, flashinfer, reference, triton",
        ),
        ({"kv_copies": "both"}, "--kv-copies both: choose daemon, stage"),
        ({"emulate_link_bandwidth": "1GiB"}, "--emulate-link-bandwidth: a GPU's link is real"),
        ({"kv_offloading_size": "300GiB"}, "--kv-offloading-size 300GiB: more than the 256.0 GiB"),
        ({"max_model_len": 200_000}, "--max-model-len 200000: the model was made for at most"),
        ({"catalogue": Path("x")}, "--catalogue x goes with --device modelled:GPU"),
        ({"layer_split": "30,1"}, "--layer-split 30,1 adds up to 31"),
        (
            {"kv_cache_memory_bytes": "64MiB", "max_model_len": 4096},
            "--kv-cache-memory-bytes 67108864 is too small",
        ),
        (
            {"kv_cache_memory_bytes": "16GiB"},
            "and a KV pool of 16.0 GiB do not fit GPU 0 (Simulated GPU, 21.4 GiB of 22.4 GiB free)",
        ),
        (
            {"pipeline_parallel_size": 4, "gpus": "0"},
            "stage 0: weights of about 4.2 GiB do not fit GPU 0 (Simulated GPU, 21.4 GiB of "
            "22.4 GiB free, 4 stages share it), of which the stage may use 3.6 GiB: take more GPUs",
        ),
    ],
)
def test_what_cannot_work_is_refused_by_name(
    build: Build, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        build(**changes)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_stages_may_share_a_gpu(build: Build) -> None:
    build.gpus(1, total_bytes=80 * GIB, free_bytes=79 * GIB)
    config = build()
    assert config.cuda is not None
    assert config.cuda.gpus == (0, 0)
    assert "2 stages on 1 GPUs: GPU 0 has 2" in build.told


@pytest.mark.parametrize(
    ("stages", "size"),
    [(1, 16), (2, 16), (4, 16), (8, 32), (16, 64), (32, 64)],  # 128 KiB a token over all stages
)
def test_blocks_are_large_enough_to_copy_fast(build: Build, stages: int, size: int) -> None:
    build.gpus(stages)
    config = build(pipeline_parallel_size=stages)
    assert config.block_size == size
    assert config.cuda is not None
    assert min(config.cuda.block_bytes) >= 512 * 2**10 or size == 64


def test_the_stage_with_the_smallest_blocks_counts(build: Build) -> None:
    build.gpus(4)
    assert build(pipeline_parallel_size=4, layer_split="20,6,3,3").block_size == 64


def test_the_longest_request_by_default_fits_the_pool_that_is_expected(build: Build) -> None:
    build.gpus(2, total_bytes=16 * 10**9, free_bytes=16 * 10**9)
    config = build()
    room = int(0.9 * 16 * 10**9) - 10**9
    layers = 16 * (HIDDEN * (32 + 2 * 8 + 32) * 128 + 3 * HIDDEN * 14_336) * 2
    tokens = (room - layers - VOCAB * HIDDEN * 2) / (16 * TOKEN_BYTES)
    assert 0.79 * tokens < config.max_model_len < 0.81 * tokens
    build.gpus(2, total_bytes=80 * GIB, free_bytes=80 * GIB)
    assert build().max_model_len == 131_072
    build.gpus(2, total_bytes=9_591_000_000, free_bytes=9_591_000_000)
    with pytest.raises(ConfigError, match="about nothing is left for KV"):
        build()
    assert build(max_model_len=256).max_model_len == 256  # the coordinator checks again


def test_a_fixed_pool_bounds_the_longest_request(build: Build) -> None:
    config = build(kv_cache_memory_bytes="1GiB")
    assert config.kv_cache_memory_bytes == GIB
    assert config.max_model_len == GIB // (16 * TOKEN_BYTES) - 16


def test_the_host_pool_is_half_of_what_is_available_at_most(build: Build) -> None:
    build.host(64 * GIB, available=50 * GIB)
    assert build().kv_offloading_bytes == 25 * GIB
    assert build(kv_offloading_size="0").kv_offloading_bytes == 0


@pytest.mark.parametrize("layers", [(18, 14), (14, 18)])
def test_the_measured_split_is_the_default(build: Build, layers: tuple[int, int]) -> None:
    """And the weights that were measured say what is left."""
    layer = PartCost(fixed_s=1e-3)
    costs = ModelCosts(
        layers=(layer,) * LAYERS,
        layer_bytes=(10**8,) * LAYERS,
        embedding=layer,
        embedding_bytes=10**9,
        head=layer,
        head_bytes=10**9,
        step=layer,
    )
    seen: list[Any] = []

    def measured(
        config: EngineConfig, info: Any, devices: list[StageDevice], asked: Any, notice: Any
    ) -> tuple[Split, tuple[ModelCosts, ...]]:
        seen.extend(devices)
        assert config.cuda is not None
        assert config.device == "cuda"
        return Split(layers, 1, 1, (0.0,) * 2, (0.0,) * 2), (costs, costs)

    build.patch.setattr(cuda_config, "measured_split", measured)
    build.gpus(1)
    config = build(layer_split=None)
    assert config.layer_split == layers
    room = StageRoom(int(0.9 * 24 * 10**9) // 2 - 1_500_000_000, None)
    assert seen == [StageDevice("Simulated GPU, 24000000000 bytes", 0, 2, room)] * 2
    left = room.limit_bytes - 10**9 - 18 * 10**8
    assert config.max_model_len == (int(0.8 * (left // (16 * 18 * TOKEN_BYTES))) - 1) * 16


def unreachable(*_: object) -> None:
    raise AssertionError("flags are checked before anything is started")


@pytest.mark.parametrize(
    "flag",
    [
        {"kv_copies": "x"},
        {"emulate_link_bandwidth": "1"},
        {"max_model_len": 10**6},
        {"layer_split": "1,2"},
        {"pipeline_parallel_size": 33},
    ],
)
def test_flags_are_checked_before_a_gpu_is_touched(
    build: Build, flag: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: Callable[..., None] = unreachable
    monkeypatch.setattr(cuda_config, "find_gpus", starts)
    with pytest.raises(ConfigError):
        build(**flag)
