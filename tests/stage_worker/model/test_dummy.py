"""Dummy weights: a model from its config.json alone, the same however it is split."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers

from pipemax.proto.errors import ModelError
from pipemax.stage_worker.model.dummy import DummyWeights
from pipemax.stage_worker.model.families import supported_family
from pipemax.stage_worker.model.inspect import inspect_model
from pipemax.stage_worker.model.load import StageModel, load_stage_model
from support.model_zoo import FAMILIES, build_model
from support.paged_run import Item, run_step, step_plan

BLOCK_SIZE = 8


def config_only(family: str, folder: Path, **overrides: object) -> Path:
    built = build_model(family, folder / "built", **overrides)
    (folder / "bare").mkdir()
    shutil.copy(built / "config.json", folder / "bare")
    return folder / "bare"


def load(folder: Path, layer_split: tuple[int, ...], dtype: str = "auto") -> list[StageModel]:
    stages = []
    for stage in range(len(layer_split)):
        model = load_stage_model(
            folder,
            stage=stage,
            layer_split=layer_split,
            dtype=dtype,
            block_size=BLOCK_SIZE,
            load_format="dummy",
        )
        model.bind_pool(torch.full((4, *model.geometry.block_shape), torch.nan, dtype=model.dtype))
        stages.append(model)
    return stages


def logits(stages: list[StageModel]) -> torch.Tensor:
    return run_step(stages, step_plan([Item(range(3, 24), 0, [2, 0, 1])]))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_runs_without_a_checkpoint(tmp_path: Path, family: str) -> None:
    folder = config_only(family, tmp_path)
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    whole = load(folder, (4,))
    assert whole[0].tensors_read == ()
    found = logits(whole)
    assert torch.isfinite(found).all()
    assert found.std() > 0
    # Not bit by bit: a tied head is multiplied with otherwise where it stands beside its embedding.
    torch.testing.assert_close(logits(load(folder, (1, 3))), found, rtol=1e-5, atol=1e-6)
    assert torch.isfinite(logits(load(folder, (4,), "bfloat16"))).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_are_like_those_transformers_starts_from(tmp_path: Path, family: str) -> None:
    folder = config_only(family, tmp_path)
    config = transformers.AutoConfig.from_pretrained(folder)
    reference = transformers.AutoModelForCausalLM.from_config(config)
    weights = DummyWeights(
        supported_family(json.loads((folder / "config.json").read_text())), config
    )
    for name, parameter in reference.named_parameters():
        drawn = weights.read(name, parameter.shape, torch.bfloat16, torch.device("cpu"))
        assert drawn.dtype == torch.bfloat16
        if parameter.dim() == 1:
            assert torch.equal(drawn.float(), parameter), name
        elif "embed" not in name:  # transformers zeroes the row of the padding token
            least, most = 0.8 * parameter.std(), 1.25 * parameter.std()
            assert least < drawn.float().std() < most, name


def test_a_tied_head_is_the_embedding_on_every_stage(tmp_path: Path) -> None:
    folder = config_only("llama", tmp_path, tie_word_embeddings=True)
    (whole,) = load(folder, (4,))
    untied = config_only("llama", tmp_path / "untied")
    assert whole.weights_bytes < load(untied, (4,))[0].weights_bytes
    torch.testing.assert_close(logits(load(folder, (2, 2))), logits([whole]), rtol=1e-5, atol=1e-6)


def test_inspection_counts_the_weights_from_the_shape(tmp_path: Path) -> None:
    folder = config_only("llama", tmp_path)
    exact = inspect_model(tmp_path / "built")
    found = inspect_model(folder, "dummy")
    assert found.weights_bytes == pytest.approx(exact.weights_bytes, rel=0.02)  # less the norms
    with pytest.raises(ModelError, match=r"no \*\.safetensors"):
        inspect_model(folder)


def test_a_shape_without_a_dtype_is_refused(tmp_path: Path) -> None:
    folder = config_only("llama", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    for key in ("dtype", "torch_dtype"):
        config.pop(key, None)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r'names no `dtype`.*add "dtype"'):
        inspect_model(folder, "dummy")


@pytest.mark.parametrize("family", ["gemma3", "mixtral"])
def test_everything_is_made_on_the_device_it_is_for(tmp_path: Path, family: str) -> None:
    """On `meta`, for want of a GPU: what the loader forgets to send there, it refuses. The first
    stage, as later ones compute something while they load."""
    stage = load_stage_model(
        build_model(family, tmp_path),
        stage=0,
        layer_split=(2, 2),
        dtype="bfloat16",
        block_size=BLOCK_SIZE,
        device=torch.device("meta"),
    )
    assert all(buffer.is_meta for _, buffer in stage.named_buffers())
