"""Models over attention on a device, here the CPU: tokens, padding, and nothing that waits."""

import random
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipemax.proto.errors import InvariantError, WireError
from pipemax.stage_worker.attention.device.batch import DeviceStep, view_batch
from pipemax.stage_worker.attention.device.layout import BatchLayout, pack_step
from pipemax.stage_worker.attention.device.paged import DevicePagedAttention
from pipemax.stage_worker.attention.device.select import open_attention
from pipemax.stage_worker.model.stage_model import StageModel
from support.fake_cuda import torch_side
from support.model_zoo import FAMILIES, build_model, reference_tokens
from support.paged_run import Item, generate, load_stages, step_plan

_CPU = torch.device("cpu")
_BLOCKS = 120
_PLAIN = partial(open_attention, name="reference", device=_CPU)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_tokens_equal_those_of_transformers(tmp_path: Path, family: str) -> None:
    rng = random.Random(7)
    prompts = [[rng.randrange(3, 512) for _ in range(length)] for length in (1, 5, 34, 100)]
    limits = [20, 1, 24, 12]
    directory = build_model(family, tmp_path)
    stages = load_stages(
        directory, (2, 2), block_size=16, num_blocks=_BLOCKS, open_attention=_PLAIN
    )
    found = generate(stages, prompts, limits, num_blocks=_BLOCKS)
    assert found == reference_tokens(directory, prompts, limits)


def _only_stage(directory: Path, opened: Any = _PLAIN) -> StageModel:
    return load_stages(directory, (4,), block_size=16, num_blocks=_BLOCKS, open_attention=opened)[0]


def _decodes(model: StageModel, rows: int) -> DeviceStep:
    """Three decodes in a buffer with room for `rows`."""
    items = [Item([5], 17, [3, 4]), Item([6], 0, [7]), Item([9], 40, [2, 0, 1])]
    attention = model.attention
    assert isinstance(attention, DevicePagedAttention)
    prepared = attention.prepare(step_plan(items))
    layout = BatchLayout.of_decodes(rows, 40)
    buffer = np.full(layout.num_bytes, 0x7F, np.uint8)
    pack_step(prepared.columns, layout, attention.tile_tokens, buffer)
    return DeviceStep(view_batch(torch.from_numpy(buffer), layout), prepared.columns)


def test_padding_changes_no_row(tmp_path: Path) -> None:
    model = _only_stage(build_model("llama", tmp_path))
    pool = torch.zeros((_BLOCKS, *model.geometry.block_shape))
    pool.uniform_(-1.0, 1.0)
    logits = []
    for rows in (3, 8):
        after = pool.clone()
        model.bind_pool(after)
        logits.append(model.forward(_decodes(model, rows), None))
        assert logits[-1].shape == (rows, 512)
        changed = (after != pool).flatten(1).any(1).nonzero().flatten().tolist()
        assert changed == [1, 4, 7]  # where the three new tokens are
    torch.testing.assert_close(logits[0], logits[1][:3], atol=1e-4, rtol=1e-3)
    assert torch.isfinite(logits[1]).all()


class _Nothing:
    """A backend that takes no time and asks nothing."""

    name = "nothing"
    graphs = True

    def bind_pool(self, pool: torch.Tensor) -> None: ...

    def plan(self, step: DeviceStep) -> None: ...

    def attend(self, step: DeviceStep, layer: int, query: torch.Tensor, *rest: Any, **options: Any):
        return torch.zeros_like(query)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stage", [0, 1])
def test_a_step_never_makes_the_host_wait(tmp_path: Path, family: str, stage: int) -> None:
    """Neither what it computes nor transformers' own forward, masks included: so it can be recorded
    in a graph, and queued while earlier steps run."""

    def opened(geometry: Any, num_heads: int) -> DevicePagedAttention:
        return DevicePagedAttention(geometry, torch.float32, num_heads, _Nothing())

    model = load_stages(
        build_model(family, tmp_path),
        (2, 2),
        block_size=16,
        num_blocks=_BLOCKS,
        open_attention=opened,
    )[stage]
    hidden = None if stage == 0 else torch.zeros(3, model.hidden_size)
    step = _decodes(model, 3)
    with torch_side._Waits() as waits:
        model.forward(step, hidden)
    assert waits.first is None


def test_a_token_the_vocabulary_lacks_is_refused(tmp_path: Path) -> None:
    model = _only_stage(build_model("llama", tmp_path))
    step = model.attention.prepare(step_plan([Item([512], 0, [0])]))
    with pytest.raises(InvariantError, match="token 512 of a vocabulary of 512"):
        model.check_tokens(step)
    with pytest.raises(InvariantError, match="token 512 of a vocabulary of 512"):
        model.forward(step, None)


def test_warm_up_runs_both_kinds_of_items(tmp_path: Path) -> None:
    seen = []

    class Seeing(_Nothing):
        def plan(self, step: DeviceStep) -> None:
            seen.append((step.batch.layout.decodes, step.batch.layout.tiles))

    def opened(geometry: Any, num_heads: int) -> DevicePagedAttention:
        return DevicePagedAttention(geometry, torch.float32, num_heads, Seeing())

    _only_stage(build_model("llama", tmp_path), opened).warm_up()
    assert seen == [(1, 1)]


def test_what_does_not_fit_the_pool_is_refused(tmp_path: Path) -> None:
    model = _only_stage(build_model("llama", tmp_path))
    attention = model.attention
    with pytest.raises(InvariantError, match="block 120 of a pool of 120 blocks"):
        attention.prepare(step_plan([Item([1], 0, [_BLOCKS])]))
    with pytest.raises(InvariantError, match="pool of shape"):
        model.bind_pool(torch.zeros(_BLOCKS, 4, 2, 16, 1, 16))
    with pytest.raises(InvariantError, match=r"pool of torch\.float16"):
        model.bind_pool(torch.zeros((2, *model.geometry.block_shape), dtype=torch.float16))
    with pytest.raises(WireError, match="1 blocks of 16"):
        attention.prepare(step_plan([Item([1], 20, [0])]))
    step = attention.prepare(step_plan([Item([1], 0, [0])]))
    attention.begin(step)
    row = torch.zeros(1, 4, 16)
    with pytest.raises(InvariantError, match="K of shape"):
        attention.attend(0, row, torch.zeros(2, 2, 16), torch.zeros(1, 2, 16), 1.0, 0, 0.0)


def test_attention_outside_a_step_is_refused(tmp_path: Path) -> None:
    model = _only_stage(build_model("llama", tmp_path))
    row = torch.zeros(1, 2, 16)
    with pytest.raises(InvariantError, match="outside a step"):
        model.attention.attend(0, row, row, row, 1.0, 0, 0.0)
