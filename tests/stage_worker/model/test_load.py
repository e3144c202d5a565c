"""A stage reads its own tensors and nothing else, and refuses what does not fit."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipemax.proto.errors import InvariantError, ModelError
from pipemax.stage_worker.model import load
from pipemax.stage_worker.model.families import FAMILIES as SUPPORTED
from pipemax.stage_worker.model.inspect import inspect_model
from pipemax.stage_worker.model.load import load_stage_model
from support.model_zoo import FAMILIES, build_model, reference_tokens
from support.paged_run import Item, generate, load_stages, run_step, step_plan


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return build_model("llama", tmp_path / "llama")


def _read_by_stages(directory: Path, layer_split: tuple[int, ...]) -> list[set[str]]:
    stages = load_stages(directory, layer_split, block_size=8, num_blocks=1)
    return [set(stage.tensors_read) for stage in stages]


@pytest.mark.parametrize("family", FAMILIES)
def test_stages_share_the_checkpoint_out(tmp_path: Path, family: str) -> None:
    """Every tensor is read by exactly one stage; only tied embeddings by two."""
    directory = build_model(family, tmp_path)
    everything = set(load_file(directory / "model.safetensors"))
    first, middle, last = _read_by_stages(directory, (1, 2, 1))
    assert first | middle | last == everything
    tied = json.loads((directory / "config.json").read_text())["tie_word_embeddings"]
    embedding = {name for name in everything if "embed_tokens" in name or "embed_in" in name}
    assert first & last == (embedding if tied else set())
    assert not middle & (first | last)
    layers_of = [
        {int(found[1]) for name in names if (found := re.search(r"layers\.(\d+)\.", name))}
        for names in (first, middle, last)
    ]
    assert layers_of == [{0}, {1, 2}, {3}]


@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen3_moe"])
def test_sharded_checkpoint_gives_the_same_tokens(tmp_path: Path, family: str) -> None:
    directory = build_model(family, tmp_path, max_shard_size="60KB")
    assert len(list(directory.glob("*.safetensors"))) > 4
    prompts, limits = [[5, 6, 7, 8], [9] * 20], [8, 8]
    stages = load_stages(directory, (2, 2), block_size=8, num_blocks=20)
    found = generate(stages, prompts, limits, num_blocks=20)
    assert found == reference_tokens(directory, prompts, limits)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_untied_heads(tmp_path: Path, family: str, tied: bool) -> None:
    directory = build_model(family, tmp_path, tie_word_embeddings=tied)
    names = set(load_file(directory / "model.safetensors"))
    assert ("lm_head.weight" in names) is not tied
    prompts, limits = [[5, 6, 7, 8], [9] * 20], [8, 8]
    expected = reference_tokens(directory, prompts, limits)
    for layer_split in ((4,), (2, 2)):
        stages = load_stages(directory, layer_split, block_size=8, num_blocks=20)
        assert generate(stages, prompts, limits, num_blocks=20) == expected


def test_a_tied_head_may_stand_in_for_the_embedding(tmp_path: Path) -> None:
    directory = build_model("llama", tmp_path, tie_word_embeddings=True)
    path = directory / "model.safetensors"
    expected = generate(
        load_stages(directory, (2, 2), block_size=8, num_blocks=4), [[5]], [8], num_blocks=4
    )
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, path, metadata={"format": "pt"})
    stages = load_stages(directory, (2, 2), block_size=8, num_blocks=4)
    assert generate(stages, [[5]], [8], num_blocks=4) == expected


def test_a_tied_tensor_is_held_once(tmp_path: Path) -> None:
    directory = build_model("llama", tmp_path, tie_word_embeddings=True)
    (whole,) = load_stages(directory, (4,), block_size=8, num_blocks=1)
    assert whole.weights_bytes == inspect_model(directory).weights_bytes


def test_old_names_of_gpt_neox(tmp_path: Path) -> None:
    directory = build_model("gpt_neox", tmp_path)
    assert "embed_out.weight" in load_file(directory / "model.safetensors")


def test_fused_experts_are_read_as_they_are(tmp_path: Path) -> None:
    """A checkpoint may hold the experts the way transformers 5 keeps them in memory."""
    directory = build_model("qwen3_moe", tmp_path)
    stages = load_stages(directory, (4,), block_size=8, num_blocks=4)
    expected = generate(stages, [[5, 6]], [8], num_blocks=4)
    path = directory / "model.safetensors"
    tensors = load_file(path)
    for layer in (0, 2, 3):
        prefix = f"model.layers.{layer}.mlp.experts."
        parts = {
            kind: torch.stack([tensors.pop(f"{prefix}{e}.{kind}_proj.weight") for e in range(4)])
            for kind in ("gate", "up", "down")
        }
        tensors[f"{prefix}gate_up_proj"] = torch.cat([parts["gate"], parts["up"]], dim=1)
        tensors[f"{prefix}down_proj"] = parts["down"]
    save_file(tensors, path, metadata={"format": "pt"})
    stages = load_stages(directory, (4,), block_size=8, num_blocks=4)
    assert generate(stages, [[5, 6]], [8], num_blocks=4) == expected


def test_missing_tensor(llama: Path) -> None:
    path = llama / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, path)
    arguments = {"layer_split": (2, 2), "dtype": "auto", "block_size": 8}
    load_stage_model(llama, stage=0, **arguments)  # does not need it
    with pytest.raises(ModelError, match=r"no tensor model\.layers\.2\.mlp\.up_proj\.weight"):
        load_stage_model(llama, stage=1, **arguments)


def test_missing_expert(tmp_path: Path) -> None:
    directory = build_model("mixtral", tmp_path)
    path = directory / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    del tensors[name]
    save_file(tensors, path)
    with pytest.raises(ModelError, match=re.escape(f"no tensor {name}")):
        load_stage_model(directory, stage=0, layer_split=(4,), dtype="auto", block_size=8)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(3, 5), r"model\.norm\.weight is \[3, 5\], config\.json asks for \[64\]"),
        (torch.zeros(64, dtype=torch.int8), r"model\.norm\.weight is torch\.int8"),
    ],
)
def test_tensor_that_does_not_fit(llama: Path, tensor: torch.Tensor, message: str) -> None:
    path = llama / "model.safetensors"
    save_file({**load_file(path), "model.norm.weight": tensor}, path)
    with pytest.raises(ModelError, match=message) as caught:
        load_stage_model(llama, stage=0, layer_split=(4,), dtype="auto", block_size=8)
    assert str(path) in str(caught.value)


def test_configuration_transformers_cannot_build(llama: Path) -> None:
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps({**config, "hidden_act": "unheard-of"}))
    with pytest.raises(ModelError, match="transformers cannot build LlamaForCausalLM"):
        load_stage_model(llama, stage=0, layer_split=(4,), dtype="auto", block_size=8)


def test_a_model_that_scales_the_input_of_later_stages_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Granite would, if the table of families did not know that it does."""
    directory = build_model("granite", tmp_path)
    granite = next(family for family in SUPPORTED if family.name == "granite")
    unaware = dataclasses.replace(granite, embedding_multiplier=None)
    monkeypatch.setattr(load, "supported_family", lambda config: unaware)
    arguments = {"layer_split": (2, 2), "dtype": "auto", "block_size": 8}
    load_stage_model(directory, stage=0, **arguments)
    with pytest.raises(ModelError, match="changes the input of later stages"):
        load_stage_model(directory, stage=1, **arguments)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_rotary_frequencies_stay_float32(tmp_path: Path, family: str) -> None:
    directory = build_model(family, tmp_path, dtype="bfloat16")
    stage = load_stage_model(directory, stage=1, layer_split=(2, 2), dtype="auto", block_size=8)
    buffers = {name: buffer for name, buffer in stage.named_buffers() if "inv_freq" in name}
    assert buffers
    for buffer in buffers.values():
        assert buffer.dtype == torch.float32
        assert buffer.flatten()[0] == 1.0
    assert stage.dtype == torch.bfloat16


def test_dtype_can_be_chosen(llama: Path) -> None:
    stage = load_stage_model(llama, stage=0, layer_split=(4,), dtype="bfloat16", block_size=8)
    assert stage.dtype == torch.bfloat16
    assert stage.geometry.dtype == "bfloat16"
    assert stage.weights_bytes * 2 == inspect_model(llama).weights_bytes


def test_attributes(llama: Path) -> None:
    first, last = load_stages(llama, (3, 1), block_size=8, num_blocks=1)
    assert (first.layers, last.layers) == ((0, 3), (3, 4))
    assert (first.is_first, first.is_last) == (True, False)
    assert (last.is_first, last.is_last) == (False, True)
    assert first.geometry.block_shape == (3, 2, 8, 2, 16)
    assert last.geometry.block_shape == (1, 2, 8, 2, 16)
    assert (first.hidden_size, first.vocab_size) == (64, 512)


def test_split_that_does_not_fit_the_model(llama: Path) -> None:
    with pytest.raises(InvariantError, match="the model has 4"):
        load_stage_model(llama, stage=0, layer_split=(2, 3), dtype="auto", block_size=8)


def test_steps_that_do_not_fit_are_refused(llama: Path) -> None:
    stages = load_stages(llama, (2, 2), block_size=8, num_blocks=3)
    with pytest.raises(InvariantError, match="block 3 of a pool of 3 blocks"):
        run_step(stages, step_plan([Item([5], 0, [3])]))
    with pytest.raises(InvariantError, match="token 512 of a vocabulary of 512"):
        run_step(stages, step_plan([Item([512], 0, [0])]))
    with pytest.raises(InvariantError, match="activations of shape None"):
        run_step(stages[1:], step_plan([Item([5], 0, [0])]))


def test_pool_that_does_not_fit_is_refused(llama: Path) -> None:
    (stage,) = load_stages(llama, (4,), block_size=8, num_blocks=1)
    shape = stage.geometry.block_shape
    with pytest.raises(InvariantError, match="pool of shape"):
        stage.bind_pool(torch.zeros(3, 4, 2, 16, 2, 16))
    with pytest.raises(InvariantError, match=r"pool of torch\.float16"):
        stage.bind_pool(torch.zeros(3, *shape, dtype=torch.float16))
    with pytest.raises(InvariantError, match="contiguous False"):
        stage.bind_pool(torch.zeros(6, *shape)[::2])


def test_a_step_before_the_pool_is_refused(llama: Path) -> None:
    stage = load_stage_model(llama, stage=0, layer_split=(4,), dtype="auto", block_size=8)
    with pytest.raises(InvariantError, match="before the pool was bound"):
        run_step([stage], step_plan([Item([5], 0, [0])]))


def test_a_step_that_samples_nothing_gives_no_logits(llama: Path) -> None:
    stages = load_stages(llama, (2, 2), block_size=8, num_blocks=3)
    out = run_step(stages, step_plan([Item([5, 6, 7], 0, [0], samples=False)]))
    assert out.shape == (0, 512)
    assert out.dtype == torch.float32


def test_warm_up_runs_on_every_stage(llama: Path) -> None:
    stages = load_stages(llama, (1, 2, 1), block_size=8, num_blocks=3)
    for stage in stages:
        stage.warm_up()
    found = generate(stages, [[5, 6, 7]], [4], num_blocks=3)
    assert found == reference_tokens(llama, [[5, 6, 7]], [4])


def test_two_models_in_one_process_do_not_mix(tmp_path: Path) -> None:
    """Their steps interleave stage by stage."""
    one = build_model("llama", tmp_path / "one", seed=1)
    two = build_model("llama", tmp_path / "two", seed=2)
    runs = {path: load_stages(path, (2, 2), block_size=8, num_blocks=3) for path in (one, two)}
    alone = {
        path: run_step(stages, step_plan([Item([5, 6], 0, [1])])) for path, stages in runs.items()
    }
    again = [
        (path, run_step(runs[path], step_plan([Item([7], 2, [1])]))) for path in (one, two, one)
    ]
    assert not torch.equal(alone[one], alone[two])
    assert torch.equal(again[0][1], again[2][1])
    assert not torch.equal(again[0][1], again[1][1])
