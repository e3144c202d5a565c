"""`--device modelled:<gpu>`: from flags to a configuration in that GPU's sizes."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipemax.coordinator.text.processor import TextProcessor
from pipemax.kv_daemon.main import MODELLED_PIECE_S, piece_bytes
from pipemax.proto.config import EngineConfig, load_config
from pipemax.proto.errors import ConfigError, ModelError
from pipemax.proto.messages.ingest import Submit
from pipemax.proto.rundir import create_run_dir, run_dir_of
from pipemax.services.cli.options import EngineOptions
from pipemax.services.cli.simulation_flags import SimulateFlags
from pipemax.services.engine_config import build_config
from pipemax.services.launcher.rundir_files import clean, fill
from pipemax.services.simulator.command import build_spec

SHAPE: dict[str, Any] = {
    "num_hidden_layers": 8,
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "intermediate_size": 2048,
    "vocab_size": 5000,
    "max_position_embeddings": 3000,
}


def build(**flags: Any) -> EngineConfig:
    values: dict[str, Any] = {
        "device": "modelled:rtx-3090",
        "model": "llama-2-70b",
        "pipeline_parallel_size": 8,
        "block_size": 32,
    }
    return build_config(EngineOptions(**{**values, **flags}), "test")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    return tmp_path


def test_sizes_are_those_of_the_simulator() -> None:
    config = build()
    spec = build_spec(SimulateFlags(gpu="rtx-3090", count=8, model="llama-2-70b"))
    device = config.modelled
    assert device is not None
    assert (config.device, device.gpu, device.shape) == ("modelled", spec.gpu, spec.model)
    assert config.layer_split == spec.layers
    block_bytes = tuple(device.block_bytes(n, config.block_size) for n in config.layer_split)
    assert block_bytes == spec.block_bytes
    assert config.kv_cache_memory_bytes // block_bytes[0] == spec.num_device_blocks
    assert config.kv_offloading_bytes == spec.host_bytes
    assert config.emulate_link_bandwidth_bytes_s == spec.gpu.link_bytes_s
    assert config.served_model_name == "llama-2-70b"
    assert config.max_model_len == (spec.num_device_blocks - 1) * 32


def test_what_is_really_held_is_small() -> None:
    config = build()
    assert config.held_block_bytes == 32 * 16
    num_host_blocks = config.kv_offloading_bytes // (80 * 2 * 8 * 128 * 2 * 32)
    assert config.held_host_bytes == num_host_blocks * 8 * 32 * 16
    assert config.held_host_bytes < 200e6


def test_the_fullest_of_unequal_stages_decides() -> None:
    config = build(pipeline_parallel_size=4, layer_split="5,15,10,10", model="llama-2-13b")
    even = build(pipeline_parallel_size=4, model="llama-2-13b")
    assert config.kv_cache_memory_bytes < even.kv_cache_memory_bytes


def test_a_time_scale_slows_the_link_as_well() -> None:
    config = build(modelled_time_scale=4.0)
    assert config.modelled is not None
    assert config.modelled.time_scale == 4.0
    assert config.emulate_link_bandwidth_bytes_s == 25e9 / 4
    assert piece_bytes(config) == 25e9 / 4 * MODELLED_PIECE_S
    slower = build(emulate_link_bandwidth="1GB", modelled_time_scale=0.5)
    assert slower.emulate_link_bandwidth_bytes_s == 2 * 10**9


def test_sizes_may_be_given() -> None:
    config = build(kv_cache_memory_bytes="1GB", kv_offloading_size="0", max_model_len=500)
    assert config.kv_cache_memory_bytes == 10**9
    assert config.kv_offloading_bytes == config.held_host_bytes == 0
    assert config.max_model_len == 500


@pytest.mark.parametrize("which", ["", "config.json"])
def test_a_model_folder_needs_no_weights(folder: Path, which: str) -> None:
    config = build(model=str(folder / which), pipeline_parallel_size=2)
    assert config.modelled is not None
    assert config.modelled.vocab_size == 5000
    assert config.modelled.shape.num_layers == 8
    assert config.model == str(folder)
    assert config.max_model_len == 3000
    assert TextProcessor(folder).vocab_size == 5000


def test_more_gpus_and_models_from_a_catalogue(tmp_path: Path) -> None:
    more = tmp_path / "more.toml"
    more.write_text(
        "[gpus.mine]\nmemory_gb = 100\nhbm_gb_s = 1000\nbf16_tflop_s = 100\nhost_link_gb_s = 20\n"
    )
    config = build(device="modelled:mine", catalogue=more, pipeline_parallel_size=4)
    assert config.modelled is not None
    assert config.modelled.gpu.link_bytes_s == 20e9


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"device": "modelled:unknown"},
            "GPU 'unknown' is not known; known are a10, l20",
        ),
        ({"device": "modelled"}, "--device modelled: write modelled:GPU, with one of a10, l20"),
        ({"device": "modelledrtx-3090"}, "write modelled:GPU"),
        ({"model": "gpt-9"}, "model 'gpt-9' is neither a folder"),
        ({"pipeline_parallel_size": 2}, "40 layers of llama-2-70b need 69.0 GB"),
        ({"modelled_time_scale": 0.0}, "--modelled-time-scale 0: give a number above 0"),
        ({"modelled_time_scale": float("inf")}, "--modelled-time-scale inf"),
        ({"dtype": "float32"}, "--dtype float32: the catalogue's rates are bfloat16's"),
        ({"threads_per_stage": 2}, "--threads-per-stage"),
        ({"sampler_workers": 1}, "--sampler-workers 1: modelled GPUs make their tokens up"),
        ({"kv_cache_memory_bytes": "20GB"}, "beside the weights rtx-3090 has"),
        ({"kv_cache_memory_bytes": "1MB"}, "--kv-cache-memory-bytes 1000000 is too small"),
        ({"kv_offloading_size": "900000TB"}, "lower --kv-offloading-size"),
        ({"device": "cpu", "modelled_time_scale": 2.0}, "goes with --device modelled"),
        ({"device": "cpu", "catalogue": Path("x")}, "--catalogue x goes with --device modelled"),
        ({"device": "tpu"}, "--device tpu: choose cpu, cuda or modelled:GPU"),
        ({"layer_split": "auto"}, "--layer-split auto measures layers"),
        ({"load_format": "dummy"}, "--load-format dummy: modelled stages load no weights"),
        ({"gpus": "0"}, "--gpus goes with --device cuda"),
    ],
)
def test_what_cannot_be_modelled_is_refused(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        build(**flags)
    assert message in str(refused.value)


def test_a_damaged_config_is_the_models_fault(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(SHAPE | {"vocab_size": "many"}))
    with pytest.raises(ModelError, match="vocab_size is 'many'"):
        build(model=str(folder), pipeline_parallel_size=2)


def test_a_model_known_by_name_gets_a_tokenizer_of_its_own() -> None:
    config = build()
    run_dir = create_run_dir("test")
    assert Path(config.model).parent == run_dir == run_dir_of("test")
    fill(run_dir, config)
    assert load_config(run_dir) == config
    text = TextProcessor(Path(config.model))
    prompt = text.encode(Submit(request_id="a", prompt="The river"), 100)
    assert text.decode(prompt, True) == "The river"
    chat = Submit(request_id="b", messages=({"role": "user", "content": "Hello"},))
    assert text.encode(chat, 100)
    of_any_model = Submit(request_id="c", prompt_token_ids=(5, 151_000))
    assert text.encode(of_any_model, 100) == (5, 151_000)
    assert config.modelled is not None
    assert max(text.eos_token_ids) < config.modelled.vocab_size
    clean(run_dir)
    assert not Path(config.model).exists()
