"""Runs a model's stages in one process over a paged pool, as a coordinator would plan it: packed
mixed steps, prompts in chunks, block ids scattered over the pool. Greedy."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from pipemax.proto.messages.control import SampleRow, StepPlan
from pipemax.proto.messages.types import pack_i32
from pipemax.stage_worker.attention.paged import Backend
from pipemax.stage_worker.model.load import AttentionFactory, StageModel, load_stage_model
from pipemax.stage_worker.sampling import sample
from support.model_zoo import EOS_TOKEN_ID


@dataclass(frozen=True)
class Item:
    """One request's part of a step."""

    tokens: Sequence[int]
    context_len: int
    blocks: Sequence[int]
    samples: bool = True


def step_plan(items: Sequence[Item], rows: Sequence[SampleRow] | None = None) -> StepPlan:
    """A plan of these items; greedy sample rows for those that sample unless `rows` are given."""
    greedy = tuple(
        SampleRow(index, 0, 0, 0.0, 0, 1.0, 0.0) for index, item in enumerate(items) if item.samples
    )
    return StepPlan(
        epoch=0,
        step=0,
        slot=0,
        wait_for_load=False,
        num_tokens=pack_i32([len(item.tokens) for item in items]),
        context_lens=pack_i32([item.context_len for item in items]),
        block_counts=pack_i32([len(item.blocks) for item in items]),
        block_tables=pack_i32([block for item in items for block in item.blocks]),
        token_ids=pack_i32([token for item in items for token in item.tokens]),
        sample=greedy if rows is None else tuple(rows),
    )


def load_stages(
    model_dir: Path,
    layer_split: tuple[int, ...],
    *,
    block_size: int,
    num_blocks: int,
    dtype: str = "auto",
    backend: Backend = "kernel",
    open_attention: AttentionFactory | None = None,
    fused_layers: bool = True,
) -> list[StageModel]:
    """Every stage, with a pool full of NaN: a read of what was never written then shows."""
    stages = []
    for stage in range(len(layer_split)):
        model = load_stage_model(
            model_dir,
            stage=stage,
            layer_split=layer_split,
            dtype=dtype,  # type: ignore[arg-type]
            block_size=block_size,
            backend=backend,
            open_attention=open_attention,
            fused_layers=fused_layers,
        )
        model.bind_pool(
            torch.full((num_blocks, *model.geometry.block_shape), torch.nan, dtype=model.dtype)
        )
        stages.append(model)
    return stages


def run_step(stages: Sequence[StageModel], plan: StepPlan) -> torch.Tensor:
    """The last stage's output."""
    hidden = None
    for stage in stages:
        hidden = stage.forward(stage.attention.prepare(plan), hidden)
    assert hidden is not None
    return hidden


@dataclass
class _Request:
    tokens: list[int]
    num_prompt: int
    limit: int
    done: int = 0
    blocks: list[int] = field(default_factory=list)

    @property
    def output(self) -> list[int]:
        return self.tokens[self.num_prompt :]

    @property
    def finished(self) -> bool:
        return len(self.output) == self.limit or self.output[-1:] == [EOS_TOKEN_ID]


def generate(
    stages: Sequence[StageModel],
    prompts: list[list[int]],
    max_new_tokens: list[int],
    *,
    num_blocks: int,
    largest_chunk: int = 40,
    most_items: int = 4,
    seed: int = 0,
) -> list[list[int]]:
    """Greedy tokens of every prompt. Which requests share a step, and how prompts are cut, is drawn
    from `seed`."""
    rng = random.Random(seed)
    block_size = stages[0].geometry.block_size
    free = list(range(num_blocks))
    rng.shuffle(free)
    requests = [
        _Request(list(prompt), len(prompt), limit)
        for prompt, limit in zip(prompts, max_new_tokens, strict=True)
    ]
    while live := [request for request in requests if not request.finished]:
        chosen = rng.sample(live, min(len(live), most_items))
        items = []
        for request in chosen:
            count = min(len(request.tokens) - request.done, rng.randint(1, largest_chunk))
            end = request.done + count
            while len(request.blocks) * block_size < end:
                request.blocks.append(free.pop())
            new = request.tokens[request.done : end]
            samples = end == len(request.tokens)
            items.append(Item(new, request.done, request.blocks, samples))
        plan = step_plan(items)
        sampled = sample(run_step(stages, plan), plan.sample)
        for request, item in zip(chosen, items, strict=True):
            request.done += len(item.tokens)
        for row, token in zip(plan.sample, sampled, strict=True):
            chosen[row.item].tokens.append(token)
    return [request.output for request in requests]
