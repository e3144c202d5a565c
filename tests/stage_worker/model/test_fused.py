"""Fused layers and packed weights against transformers' own modules, which compute the same."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from pipemax.stage_worker.model import fused, load, packed, products, row_kernels, skeleton
from pipemax.stage_worker.model.families import FAMILIES
from pipemax.stage_worker.model.packed import (
    GatedLinear,
    PackedLinear,
    pack_modules,
    padded_rows,
)
from support.model_zoo import build_model
from support.paged_run import Item, load_stages, run_step, step_plan

DTYPES = (torch.float32, torch.bfloat16)


def _stages(directory: Path, *, fused_layers: bool, dtype: str, split: tuple[int, ...]):
    return load_stages(
        directory, split, block_size=8, num_blocks=64, dtype=dtype, fused_layers=fused_layers
    )


def _steps():
    """A prompt in two chunks, the first without a sample; then a mixed step, whose samples are not
    in the order of its rows; then one that only decodes."""
    first, second = list(range(20)), list(range(20, 40))
    prompt = [7 + 3 * index % 500 for index in range(130)]
    yield step_plan([Item(prompt[:100], 0, first, samples=False)])
    yield step_plan([Item(prompt[100:], 100, first), Item(prompt[50:90], 0, second)])
    yield step_plan([Item([9], 130, first), Item(prompt[:30], 40, second)])
    yield step_plan([Item([11], 131, first), Item([12], 70, second)])


@pytest.mark.parametrize("split", [(4,), (2, 2)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", [family.name for family in FAMILIES if family.fused])
@torch.inference_mode()
def test_logits_are_those_of_the_plain_modules(
    tmp_path: Path, family: str, dtype: str, split: tuple[int, ...]
) -> None:
    directory = build_model(family, tmp_path)
    plain = _stages(directory, fused_layers=False, dtype=dtype, split=split)
    fast = _stages(directory, fused_layers=True, dtype=dtype, split=split)
    assert all(stage.fused for stage in fast)
    assert not any(stage.fused for stage in plain)
    for number, plan in enumerate(_steps()):
        expected, found = run_step(plain, plan), run_step(fast, plan)
        assert found.shape == expected.shape
        assert found.dtype == torch.float32
        if number == 0:
            assert found.shape[0] == 0
        elif dtype == "float32":
            torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)
        else:
            pairs = torch.stack([found.flatten(), expected.flatten()])
            assert torch.corrcoef(pairs)[0, 1] > 0.995


@pytest.mark.parametrize("tied", [False, True])
def test_weights_are_not_kept_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool
) -> None:
    """All of the fused weights are gone from the modules that they were loaded into, but for those
    of a tied model on a single stage, whose embedding is the head."""
    built: list[skeleton.Skeleton] = []

    def recorded(shape: skeleton.Shape) -> skeleton.Skeleton:
        built.append(skeleton.build_skeleton(shape))
        return built[-1]

    monkeypatch.setattr(load, "build_skeleton", recorded)
    directory = build_model("llama", tmp_path, tie_word_embeddings=tied)
    _stages(directory, fused_layers=True, dtype="float32", split=(4,))
    (model,) = built
    left = {name: tensor for name, tensor in model.state_dict().items() if tensor.numel()}
    assert {name.split(".")[-2] for name in left} == {
        *("embed_tokens", "norm", "input_layernorm", "post_attention_layernorm"),
        *(("lm_head",) if tied else ()),
    }
    if tied:
        embedding, head = left["model.embed_tokens.weight"], left["lm_head.weight"]
        assert head.data_ptr() == embedding.data_ptr()


def test_an_activation_of_another_kind_is_left_to_transformers(tmp_path: Path) -> None:
    directory = build_model("llama", tmp_path, hidden_act="gelu")
    (stage,) = _stages(directory, fused_layers=True, dtype="float32", split=(4,))
    assert stage.fused is None


@pytest.fixture(params=["ours", "onednn", "plain"])
def whose(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whose products packed matrices have, whatever this machine would choose."""
    kind: str = request.param
    if kind != "ours":
        monkeypatch.setattr(products, "can_tile", lambda dtype: False)
    if kind == "plain":
        monkeypatch.setattr(packed, "has_onednn", lambda dtype: False)
    return kind


def _near(dtype: torch.dtype) -> dict[str, float]:
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    return {"atol": tolerance, "rtol": tolerance}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@torch.inference_mode()
def test_a_packed_matrix_computes_what_plain_ones_do(
    whose: str, bias: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(1)
    linears = [nn.Linear(24, size, bias=bias).to(dtype) for size in (16, 8, 40)]
    rows = torch.randn(11, 24).to(dtype)
    other = torch.randn(11, 64).to(dtype)
    product = PackedLinear(*linears)
    plain = torch.cat([linear(rows) for linear in linears], dim=1)
    for found, expected in (
        (product(rows), plain),
        (product.plus(rows, other), plain + other),
        (product(rows[:0]), plain[:0]),
    ):
        assert found.dtype == dtype
        torch.testing.assert_close(found, expected, **_near(dtype))


@pytest.mark.parametrize("size", [64, 40])
@pytest.mark.parametrize("dtype", DTYPES)
@torch.inference_mode()
def test_a_gated_matrix_is_an_activation_times_another(
    whose: str, dtype: torch.dtype, size: int
) -> None:
    """Of 40 outputs some are in no whole panel."""
    torch.manual_seed(2)
    gate, up = (nn.Linear(24, size, bias=False).to(dtype) for _ in range(2))
    rows = torch.randn(11, 24).to(dtype)
    rows[0] = 1e4 * torch.sign(gate.weight[0])  # far out, on both sides
    found = GatedLinear(gate, up)(rows)
    expected = functional.silu(gate(rows).float()) * up(rows).float()
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, **_near(dtype))


def test_biases_come_together_or_not_at_all() -> None:
    with pytest.raises(ValueError, match="some of the matrices have a bias"):
        PackedLinear(nn.Linear(8, 8), nn.Linear(8, 8, bias=False))


@torch.inference_mode()
def test_packing_a_models_linears_spares_shared_ones() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.ReLU()))
    embedding = nn.Embedding(8, 8)
    head = nn.Linear(8, 8, bias=False)
    head.weight = embedding.weight
    whole = nn.ModuleDict({"layers": model, "embedding": embedding, "head": head})
    rows = torch.randn(2, 3, 8)
    expected = model(rows)
    pack_modules(whole)
    assert isinstance(whole["head"], nn.Linear)
    assert not any(isinstance(module, nn.Linear) for module in model.modules())
    torch.testing.assert_close(model(rows), expected)


def test_for_onednn_rows_are_padded_a_little_and_to_few_sizes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(products, "can_tile", lambda dtype: False)
    for rows in range(1, 5000):
        padded = padded_rows(rows, torch.float32)
        assert rows <= padded <= max(rows + 7, rows * 65 / 64)
    assert len({padded_rows(rows, torch.float32) for rows in range(1, 1025)}) == 128
    assert padded_rows(0, torch.float32) == 0
    monkeypatch.setattr(products, "can_tile", lambda dtype: True)
    assert padded_rows(3, torch.float32) == 3


@pytest.mark.parametrize("size", [8, 96, 100])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
def test_the_norm_is_transformers(size: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(size)
    rows = (torch.randn(13, size, generator=generator) * 30).to(dtype)
    weight = torch.randn(size, generator=generator).to(dtype)
    wide = rows.float()
    scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
    expected = weight * scaled.to(dtype)
    found = row_kernels.rms_norm(rows, weight, 1e-5)
    assert found.dtype == dtype
    tight = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    torch.testing.assert_close(found, expected, atol=0.0, rtol=tight)
    spread = rows[:, None].expand(13, 2, size).transpose(0, 1)[0]
    torch.testing.assert_close(row_kernels.rms_norm(spread, weight, 1e-5), found)


def test_which_layers_see_a_window(tmp_path: Path) -> None:
    """A guard for the names by which each family's modules know of it."""
    windows = {}
    for family in FAMILIES:
        if family.fused:
            directory = build_model(family.name, tmp_path / family.name)
            (stage,) = _stages(directory, fused_layers=True, dtype="float32", split=(4,))
            assert isinstance(stage.fused, fused.FusedLayers)
            windows[family.name] = stage.fused.windows
    assert windows["llama"] == (0, 0, 0, 0)
    assert all(windows["mistral"])
    assert any(windows["qwen2"])
