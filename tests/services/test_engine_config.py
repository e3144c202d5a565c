"""Every flag that cannot work gives one line that names it and says what would."""

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipemax.proto.config import EngineConfig
from pipemax.proto.errors import ConfigError, ModelError, PipemaxError, UnsupportedModelError
from pipemax.proto.geometry import blocks_for
from pipemax.services import engine_config
from pipemax.services.cli.options import EngineOptions
from pipemax.services.config_limits import SPARE_BLOCKS
from pipemax.services.engine_config import build_config

LAYERS, KV_HEADS, HEAD_DIM, MAX_POSITIONS = 5, 2, 8, 512


def write_safetensors(path: Path) -> None:
    header = json.dumps({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder that passes for a Llama: a configuration, and one tensor."""
    folder = tmp_path / "model"
    folder.mkdir()
    write_config(folder)
    write_safetensors(folder / "model.safetensors")
    return folder


def write_config(folder: Path, **changes: Any) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": LAYERS,
        "max_position_embeddings": MAX_POSITIONS,
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "dtype": "float32",
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config | changes))


def options(folder: Path, /, **changes: Any) -> EngineOptions:
    small = EngineOptions(
        model=str(folder), kv_cache_memory_bytes="1MiB", kv_offloading_size="1MiB"
    )
    return replace(small, **changes)


def build(folder: Path, /, **changes: Any) -> EngineConfig:
    return build_config(options(folder, **changes), "test")


def token_bytes(layers: int, dtype_bytes: int = 4) -> int:
    return 2 * layers * KV_HEADS * HEAD_DIM * dtype_bytes


def test_defaults(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_config, "usable_cores", lambda: 7)
    config = build(model, pipeline_parallel_size=2)
    assert config.name == "test"
    assert config.model == str(model)
    assert config.served_model_name == str(model)
    assert config.layer_split == (3, 2)
    assert config.max_model_len == MAX_POSITIONS
    assert config.threads_per_stage == 3
    assert config.kv_cache_memory_bytes == config.kv_offloading_bytes == 2**20
    assert config.emulate_link_bandwidth_bytes_s is None


def test_samplers_take_cores_and_memory_of_their_own(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_config, "usable_cores", lambda: 7)
    flags = {"pipeline_parallel_size": 2, "sampler_workers": 2}
    assert build(model, **flags).threads_per_stage == 2
    monkeypatch.setattr(engine_config, "memory_bytes", lambda: 4 * 2**20)
    with pytest.raises(ConfigError, match=r"logits for samplers 128\.0 KiB \(--max-num-seqs\)"):
        build(model, **flags, kv_offloading_size="2MiB")


def test_every_flag_reaches_the_configuration(model: Path) -> None:
    config = build(
        model,
        served_model_name="mine",
        dtype="bfloat16",
        max_model_len=100,
        seed=7,
        pipeline_parallel_size=3,
        layer_split="1,3,1",
        threads_per_stage=5,
        activation_transport="tcp",
        block_size=8,
        kv_cache_memory_bytes="2MiB",
        kv_offloading_size="0",
        emulate_link_bandwidth="1.5GiB",
        max_num_seqs=9,
        max_num_batched_tokens=77,
        policy="static-prefetch:0.1",
        prefill="phases",
        metrics_host="0.0.0.0",
        metrics_port=9001,
    )
    assert config == EngineConfig(
        name="test",
        model=str(model),
        served_model_name="mine",
        dtype="bfloat16",
        max_model_len=100,
        seed=7,
        pipeline_parallel_size=3,
        layer_split=(1, 3, 1),
        threads_per_stage=5,
        activation_transport="tcp",
        block_size=8,
        kv_cache_memory_bytes=2 * 2**20,
        kv_offloading_bytes=0,
        emulate_link_bandwidth_bytes_s=3 * 2**29,
        max_num_seqs=9,
        max_num_batched_tokens=77,
        policy="static-prefetch:0.1",
        prefill="phases",
        metrics_host="0.0.0.0",
        metrics_port=9001,
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "--model is missing"),
        ({"device": "tpu"}, "--device tpu: choose cpu, cuda or modelled:GPU"),
        ({"gpus": "0"}, "--gpus goes with --device cuda"),
        ({"gpu_memory_utilization": 0.5}, "--gpu-memory-utilization goes with --device cuda"),
        ({"attention_backend": "auto"}, "--attention-backend goes with --device cuda"),
        ({"enforce_eager": True}, "--enforce-eager goes with --device cuda"),
        ({"kv_copies": "stage"}, "--kv-copies goes with --device cuda"),
        ({"activation_transport": "ipc"}, "--activation-transport ipc goes with --device cuda"),
        ({"load_format": "gguf"}, "--load-format gguf: choose auto, dummy"),
        ({"dtype": "int8"}, "--dtype int8: choose auto, bfloat16, float16, float32"),
        (
            {"activation_transport": "pigeon"},
            "--activation-transport pigeon: choose auto, ipc, shm, tcp",
        ),
        ({"block_size": 0}, "--block-size 0: expected int >= 1"),
        ({"block_size": 257}, "--block-size 257: expected int <= 256"),
        ({"seed": -1}, "--seed -1: expected int >= 0"),
        ({"threads_per_stage": 0}, "--threads-per-stage 0: expected int >= 1"),
        ({"max_num_seqs": 0}, "--max-num-seqs 0"),
        ({"max_num_batched_tokens": -3}, "--max-num-batched-tokens -3"),
        ({"prefill": "both"}, "--prefill both: choose mixed, phases"),
        ({"policy": "newest"}, "--policy newest: choose pipemax, oldest-first, fcfs"),
        ({"policy": "static-prefetch:2"}, "--policy static-prefetch: '2' is not a fraction"),
        ({"metrics_port": 70000}, "--metrics-port 70000: expected int <= 65535"),
        ({"ready_timeout": 0.0}, "--ready-timeout 0: must be more than 0"),
        ({"ready_timeout": float("nan")}, "--ready-timeout nan"),
        ({"kv_cache_memory_bytes": "many"}, "--kv-cache-memory-bytes: 'many' is not a size"),
        ({"kv_cache_memory_bytes": "0"}, "--kv-cache-memory-bytes 0: expected int >= 1"),
        ({"kv_offloading_size": "-1GiB"}, "--kv-offloading-size: '-1GiB' is not a size"),
        ({"emulate_link_bandwidth": "0"}, "--emulate-link-bandwidth 0: expected int >= 1"),
        ({"pipeline_parallel_size": 0}, "--pipeline-parallel-size 0: expected int >= 1"),
        ({"pipeline_parallel_size": 6}, "--pipeline-parallel-size 6: the model has 5 layers"),
        ({"layer_split": "2;3"}, "--layer-split 2;3: write auto, estimated, even or the layers"),
        ({"layer_split": "5,0"}, "--layer-split 5,0: write auto, estimated, even or the layers"),
        ({"layer_split": "2,3"}, "--layer-split 2,3 is for 2 stages, but"),
        ({"layer_split": "4"}, "--layer-split 4 adds up to 4; the model has 5"),
        ({"max_model_len": 0}, "--max-model-len 0: expected int >= 1"),
        ({"max_model_len": 513}, "--max-model-len 513: the model was made for at most 512"),
        ({"kv_offloading_size": "900TiB"}, "900.0 TiB needed"),
    ],
)
def test_what_cannot_work_is_refused_by_name(
    model: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        build(model, **changes)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["", "../x", "a b", "x" * 41, "-x"])
def test_names_that_are_no_folder_names_are_refused(model: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"--name .*: use at most 40 letters"):
        build_config(options(model), name)


def test_pool_too_small_says_how_many_bytes_are_needed(model: Path) -> None:
    block_bytes = 16 * token_bytes(3)  # the larger of two stages
    needed = (blocks_for(100, 16) + SPARE_BLOCKS) * block_bytes
    changes = {"pipeline_parallel_size": 2, "max_model_len": 100}
    with pytest.raises(ConfigError, match=rf"--max-model-len 100 needs {needed} bytes"):
        build(model, kv_cache_memory_bytes=str(needed - 1), **changes)
    assert build(model, kv_cache_memory_bytes=str(needed), **changes).max_model_len == 100


def test_dummy_weights_need_a_shape_only(model: Path) -> None:
    (model / "model.safetensors").unlink()
    assert build(model, load_format="dummy").load_format == "dummy"
    write_config(model, hidden_size=2**20, head_dim=None, num_attention_heads=2**14)
    with pytest.raises(ConfigError, match=r"weights 40\.0 TiB"):
        build(model, load_format="dummy")


def test_stages_stay_awake_only_where_others_have_cores(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_config, "usable_cores", lambda: 4)
    two = {"pipeline_parallel_size": 2, "threads_per_stage": 1}
    assert build(model, **two).spin_wait_s > 0
    assert build(model, **(two | {"threads_per_stage": 2})).spin_wait_s == 0
    assert build(model, **two, spin_wait_s=0.0).spin_wait_s == 0
    assert build(model, **(two | {"threads_per_stage": 2}), spin_wait_s=5e-4).spin_wait_s == 5e-4
    with pytest.raises(ConfigError, match=r"--spin-wait-s 1\.0"):
        build(model, **two, spin_wait_s=1.0)


def test_pinning_needs_a_core_for_each_thread(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_config, "usable_cores", lambda: 3)
    assert build(model, pipeline_parallel_size=3, pin_cores=True).pin_cores
    assert not build(model, pipeline_parallel_size=3).pin_cores
    with pytest.raises(ConfigError, match="--pin-cores: 4 stages of 1 threads need 4 cores"):
        build(model, pipeline_parallel_size=4, pin_cores=True)
    with pytest.raises(ConfigError, match="--pin-cores goes with --device cpu"):
        build(model, device="modelled:rtx-3090", pin_cores=True)


def test_an_even_split_can_be_asked_for(model: Path) -> None:
    assert build(model, pipeline_parallel_size=2, layer_split="even").layer_split == (3, 2)


@pytest.mark.parametrize("stages", [1, LAYERS])
def test_nothing_is_measured_where_there_is_no_choice(
    model: Path, stages: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_config, "measured_split", None)
    build(model, pipeline_parallel_size=stages, layer_split="auto")


def test_default_length_is_what_the_pool_holds(model: Path) -> None:
    block_bytes = 16 * token_bytes(LAYERS)
    config = build(model, kv_cache_memory_bytes=str((4 + SPARE_BLOCKS) * block_bytes))
    assert config.max_model_len == 64
    with pytest.raises(ConfigError, match="one request needs"):
        build(model, kv_cache_memory_bytes=str(block_bytes))


def test_dtype_decides_what_fits(model: Path) -> None:
    half = (blocks_for(MAX_POSITIONS, 16) + SPARE_BLOCKS) * 16 * token_bytes(LAYERS, 2)
    assert build(model, kv_cache_memory_bytes=str(half)).max_model_len < MAX_POSITIONS
    sixteen_bit = build(model, kv_cache_memory_bytes=str(half), dtype="bfloat16")
    assert sixteen_bit.max_model_len == MAX_POSITIONS


def no_folder(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-3])


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (no_folder, ModelError),
        (lambda folder: (folder / "config.json").unlink(), ModelError),
        (lambda folder: (folder / "model.safetensors").unlink(), ModelError),
        (truncated, ModelError),
        (
            lambda folder: write_config(folder, architectures=["NovelLM"], model_type="novel"),
            UnsupportedModelError,
        ),
    ],
)
def test_damaged_model_folders_are_refused_before_anything_starts(
    model: Path, damage: Callable[[Path], None], error: type[PipemaxError]
) -> None:
    build(model)
    damage(model)
    with pytest.raises(error) as raised:
        build(model)
    assert "\n" not in str(raised.value)
