"""Modules made without transformers are transformers', as far as anybody looks at them."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pipemax.stage_worker.model.families import supported_family
from pipemax.stage_worker.model.fused import _window
from pipemax.stage_worker.model.inspect import read_config
from pipemax.stage_worker.model.load import build_on_meta, load_stage_model
from pipemax.stage_worker.model.skeleton import Shape, build_skeleton, read_shape
from support.model_zoo import build_model

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"rope_parameters": LLAMA3}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("mistral", {}),
    ("qwen2", {"use_sliding_window": False, "layer_types": ["full_attention"] * 4}),
    ("qwen3", {}),
]


def shape_of(folder: Path, **changes: Any) -> Shape | None:
    config = {**read_config(folder), **changes}
    return read_shape(supported_family(config), config)


@pytest.mark.parametrize(("family", "changes"), MODELS)
def test_it_is_what_transformers_builds(
    tmp_path: Path, family: str, changes: dict[str, Any]
) -> None:
    folder = build_model(family, tmp_path, **changes)
    shape = shape_of(folder)
    assert shape is not None
    found = supported_family(read_config(folder))
    mine, theirs = build_skeleton(shape), build_on_meta(folder, found)
    assert {name: tensor.shape for name, tensor in mine.state_dict().items()} == {
        name: tensor.shape for name, tensor in theirs.state_dict().items()
    }
    assert mine.config.tie_word_embeddings == theirs.config.tie_word_embeddings
    for layer, other in zip(mine.model.layers, theirs.model.layers, strict=True):
        assert layer.self_attn.scaling == other.self_attn.scaling
        assert layer.self_attn.layer_idx == other.self_attn.layer_idx
        assert _window(found, layer, mine.config) == _window(found, other, theirs.config)
        norms = (layer.input_layernorm, other.input_layernorm)
        assert norms[0].variance_epsilon == norms[1].variance_epsilon


@pytest.mark.parametrize(("family", "changes"), [MODELS[0], MODELS[1], MODELS[5]])
def test_positions_are_rotated_as_transformers_does(
    tmp_path: Path, family: str, changes: dict[str, Any]
) -> None:
    folder = build_model(family, tmp_path, **changes)
    theirs = build_on_meta(folder, supported_family(read_config(folder)))
    shape = shape_of(folder)
    assert shape is not None
    rotary = type(theirs.model.rotary_emb)(config=theirs.config)
    mine = type(build_skeleton(shape).model.rotary_emb)(shape)
    assert torch.equal(mine.inv_freq, rotary.inv_freq)
    positions, like = torch.tensor([[0, 1, 63, 64, 1023, 100_000]]), torch.empty(0)
    for one, other in zip(mine(like, positions), rotary(like, positions), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gemma2", {}),
        ("qwen2", {}),  # has windows
        ("llama", {"hidden_act": "gelu"}),
        ("llama", {"rms_norm_eps": None}),
        ("llama", {"rope_parameters": None, "rope_theta": None}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}),
        ("llama", {"rope_parameters": {**LLAMA3, "factor": None}}),
        ("llama", {"rope_scaling": {"rope_type": "default"}}),  # beside rope_parameters
        ("llama", {"partial_rotary_factor": 0.5}),
    ],
)
def test_what_it_does_not_know_is_left_to_transformers(
    tmp_path: Path, family: str, changes: dict[str, Any]
) -> None:
    assert shape_of(build_model(family, tmp_path), **changes) is None


def test_old_and_new_ways_to_write_the_rotation_are_read_alike(tmp_path: Path) -> None:
    folder = build_model("llama", tmp_path)
    old = {**LLAMA3}
    theta = old.pop("rope_theta")
    new = shape_of(folder, rope_parameters=LLAMA3)
    assert new is not None
    assert new == shape_of(folder, rope_parameters=None, rope_scaling=old, rope_theta=theta)


def test_a_llama_is_loaded_without_transformers(tmp_path: Path) -> None:
    folder = build_model("llama", tmp_path)
    stage = load_stage_model(folder, stage=1, layer_split=(2, 2), dtype="auto", block_size=8)
    assert stage.fused is not None
    code = (
        "import sys; from pathlib import Path\n"
        "from pipemax.stage_worker.model.load import load_stage_model\n"
        f"load_stage_model(Path({str(folder)!r}), stage=1, layer_split=(2, 2), dtype='auto', "
        "block_size=8)\n"
        "heavy = {'transformers', 'torch._dynamo', 'sympy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_plain_form_is_still_transformers(tmp_path: Path) -> None:
    folder = build_model("llama", tmp_path)
    stage = load_stage_model(
        folder, stage=0, layer_split=(4,), dtype="auto", block_size=8, fused_layers=False
    )
    assert stage.fused is None
    assert "transformers" in sys.modules
