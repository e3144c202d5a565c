"""Logits of a stage's model against transformers on the same tokens, in 16 bits by tolerance.

The truth is transformers in float32 with the same weights. In 16 bits two right programs differ, so
ours may be as far from the truth as transformers' own 16-bit forward is, and half as much again.
"""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from pipemax.proto.geometry import BlockGeometry
from pipemax.stage_worker.attention.device.paged import DevicePagedAttention
from pipemax.stage_worker.attention.device.select import open_attention
from pipemax.stage_worker.model.load import load_stage_model
from support.model_zoo import build_model
from support.paged_run import Item, step_plan

CASES = (
    ("llama", "float32"),
    ("llama", "bfloat16"),
    ("llama", "float16"),
    ("gemma2", "bfloat16"),
    ("qwen3", "bfloat16"),
)
FLOAT32_ERROR = 1e-4
MORE_THAN_THEIRS = 1.5
_CHUNKS = (1, 70, 33, *[1] * 16)
"""New tokens of each step: a prompt in pieces, then decode steps on given tokens."""
_BLOCK_SIZE, _OTHERS = 16, 3


@pytest.mark.parametrize(("family", "dtype"), CASES)
def test_logits_follow_transformers(
    family: str, dtype: str, device: torch.device, tmp_path: Path, figure: Callable[..., None]
) -> None:
    model_dir = build_model(family, tmp_path / "model", dtype=dtype)
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 512, (sum(_CHUNKS),), generator=generator).tolist()
    truth, theirs = (transformers_logits(model_dir, name, ids, device) for name in
                     ("float32", dtype))  # fmt: skip
    ours = stage_logits(model_dir, ids, device)
    asked = torch.tensor(_CHUNKS, device=device).cumsum(0) - 1
    our_error = relative_error(ours, truth[asked])
    their_error = relative_error(theirs[asked], truth[asked])
    limit = FLOAT32_ERROR if dtype == "float32" else MORE_THAN_THEIRS * their_error
    figure(
        f"{family} {dtype}: error of the logits", our_error, at_most=limit,
        note=f"‖ours − float32‖ / ‖float32‖; transformers' own {their_error:.1e}",
    )  # fmt: skip
    assert our_error <= limit


def relative_error(found: torch.Tensor, truth: torch.Tensor) -> float:
    if not bool(torch.isfinite(found).all()):
        return math.inf
    return float((found.double() - truth.double()).norm() / truth.double().norm())


@torch.inference_mode()
def transformers_logits(
    model_dir: Path, dtype: str, ids: list[int], device: torch.device
) -> torch.Tensor:
    """`[tokens, vocabulary]`"""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=getattr(torch, dtype), attn_implementation="eager"
    )
    logits: torch.Tensor = model.to(device).eval()(torch.tensor([ids], device=device)).logits[0]
    return logits.float()


def stage_logits(model_dir: Path, ids: list[int], device: torch.device) -> torch.Tensor:
    """Of each chunk's last token. Other requests' tokens are computed in the same steps, and what
    nobody wrote in the pool is NaN."""

    def attention(geometry: BlockGeometry, num_heads: int) -> DevicePagedAttention:
        return open_attention(geometry, num_heads, "auto", device)

    model = load_stage_model(
        model_dir,
        stage=0,
        layer_split=(4,),
        dtype="auto",
        block_size=_BLOCK_SIZE,
        device=device,
        open_attention=attention,
    )
    blocks = -(-len(ids) // _BLOCK_SIZE)
    shape = ((1 + _OTHERS) * blocks, *model.geometry.block_shape)
    model.bind_pool(torch.full(shape, torch.nan, dtype=model.dtype, device=device))
    scattered = torch.randperm(shape[0], generator=torch.Generator().manual_seed(6)).tolist()
    tables = [scattered[blocks * one : blocks * (one + 1)] for one in range(1 + _OTHERS)]
    rows, done = [], 0
    for count in _CHUNKS:
        end = done + count
        used = -(-end // _BLOCK_SIZE)
        new = [ids[done:end], *([(7 * one + at) % 500 + 3 for at in range(done, end)]
                                for one in range(_OTHERS))]  # fmt: skip
        items = [
            Item(tokens, done, table[:used]) for tokens, table in zip(new, tables, strict=True)
        ]
        step = model.attention.prepare(step_plan(items))
        rows.append(model.forward(step, None)[0])
        done = end
    return torch.stack(rows)


def test_wrong_logits_are_seen() -> None:
    truth = torch.randn(3, 10)
    assert relative_error(truth, truth) == 0
    assert relative_error(truth * 1.1, truth) == pytest.approx(0.1)
    assert relative_error(truth.index_fill(0, torch.tensor([1]), torch.nan), truth) == math.inf
