"""The default split on CPUs: by arithmetic, with the head counted."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipemax.proto.config import EngineConfig
from pipemax.proto.errors import ConfigError, ModelError
from pipemax.services.cli.options import EngineOptions
from pipemax.services.engine_config import build_config
from pipemax.services.estimated_split import estimated_costs
from pipemax.stage_worker.layer_costs import ModelCosts
from pipemax.stage_worker.model.inspect import inspect_model

SHAPE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "vocab_size": 16_384,
    "hidden_size": 768,
    "intermediate_size": 2304,
    "num_hidden_layers": 14,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
LARGE_HEAD = {
    "vocab_size": 128_256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}


def folder(tmp_path: Path, **changes: Any) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(SHAPE | changes))
    return tmp_path


def build(model: Path, **flags: Any) -> tuple[EngineConfig, list[str]]:
    notices: list[str] = []
    values: dict[str, Any] = {
        "pipeline_parallel_size": 2,
        "kv_offloading_size": "1MiB",
        "load_format": "dummy",
    }
    options = EngineOptions(model=str(model), **(values | flags))
    return build_config(options, "t", notices.append), notices


def costs_of(model: Path, *, fused_layers: bool = True) -> ModelCosts:
    info = inspect_model(model, "dummy")
    return estimated_costs(model, info, "bfloat16", fused_layers=fused_layers)


def test_a_head_worth_several_layers_costs_the_last_stage_as_many(tmp_path: Path) -> None:
    config, notices = build(folder(tmp_path, **LARGE_HEAD))
    first, last = config.layer_split
    assert first > last
    assert first + last == 16
    # Were all tokens sampled, the head's 262 M weights would be worth 4.3 layers of 61 M.
    assert first - last <= 4
    assert "--layer-split even" in notices[0]
    assert build(tmp_path, layer_split="even")[0].layer_split == (8, 8)


def test_longer_answers_move_more_layers_away_from_the_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder(tmp_path, **LARGE_HEAD)

    def share(prompt_tokens: float, output_tokens: float) -> int:
        monkeypatch.setattr("pipemax.services.measured_split._PROMPT_TOKENS", prompt_tokens)
        monkeypatch.setattr("pipemax.services.measured_split._OUTPUT_TOKENS", output_tokens)
        return build(tmp_path, kv_cache_memory_bytes="4GiB")[0].layer_split[1]

    assert share(1.0, 100.0) < share(400.0, 100.0) <= 8


@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_a_head_worth_less_than_moving_a_layer_changes_nothing(
    tmp_path: Path, activation: str
) -> None:
    config, notices = build(folder(tmp_path, hidden_act=activation))
    assert config.layer_split == (7, 7)
    assert notices == []


def test_parts_weigh_what_the_checkpoint_holds(tmp_path: Path) -> None:
    folder(tmp_path, **LARGE_HEAD)
    costs = costs_of(tmp_path)
    layer, head = costs.layers[0], costs.head
    assert head.request_s / layer.request_s == pytest.approx(262.7 / 60.8, rel=0.01)
    assert head.prompt_s == 0
    assert layer.prompt_s == layer.request_s
    untied = folder(tmp_path, **(LARGE_HEAD | {"tie_word_embeddings": False}))
    assert costs_of(untied).layers == costs.layers


def test_a_fused_last_layer_computes_little_of_a_prompt(tmp_path: Path) -> None:
    folder(tmp_path, **LARGE_HEAD, hidden_act="silu")
    *others, last = costs_of(tmp_path).layers
    assert last.prompt_s / others[-1].prompt_s == pytest.approx(6.3 / 60.8, rel=0.01)
    assert (last.request_s, last.context_s) == (others[-1].request_s, others[-1].context_s)
    assert set(costs_of(tmp_path, fused_layers=False).layers) == set(others)
    unfused = folder(tmp_path, **LARGE_HEAD, hidden_act="gelu")
    assert set(costs_of(unfused).layers) == set(others)


def test_a_last_layer_that_computes_little_makes_room_for_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipemax.services.measured_split._OUTPUT_TOKENS", 10.0)
    folder(tmp_path, num_hidden_layers=15, hidden_act="silu")
    assert build(tmp_path)[0].layer_split == (7, 8)
    assert build(tmp_path, fused_layers=False)[0].layer_split == (8, 7)


def test_a_shape_left_to_the_family_is_split_evenly_unless_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(path: Path) -> None:
        raise ModelError(f"{path}: no shape")

    folder(tmp_path, **LARGE_HEAD)
    monkeypatch.setattr("pipemax.services.estimated_split.model_from_config", unknown)
    assert build(tmp_path)[0].layer_split == (8, 8)
    with pytest.raises(ModelError, match="no shape"):
        build(tmp_path, layer_split="estimated")


def test_it_is_for_cpus(tmp_path: Path) -> None:
    folder(tmp_path)
    with pytest.raises(ConfigError, match="estimated knows CPUs only"):
        build(tmp_path, layer_split="estimated", device="modelled:rtx-3090", load_format="auto")
