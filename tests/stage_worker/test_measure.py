"""Costs of parts are told apart from the times of stages that hold several."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pipemax.proto.config import CudaDevice, EngineConfig
from pipemax.proto.messages.control import SweepSample
from pipemax.stage_worker import measure as measuring
from pipemax.stage_worker.layer_costs import ModelCosts, PartCost
from pipemax.stage_worker.measure import (
    Part,
    config_of,
    costs_of,
    fit,
    measure,
    parts_to_measure,
    times_of,
)
from pipemax.stage_worker.model.inspect import inspect_model
from pipemax.stage_worker.model.parts import ModelParts, model_parts
from support.cuda_stage import simulated
from support.model_zoo import build_model

STEP = PartCost(fixed_s=2e-3, request_s=1e-5)
EMBEDDING = PartCost(fixed_s=1e-3, prompt_s=1e-6)
HEAD = PartCost(fixed_s=5e-3, request_s=1e-4, prompt_s=2e-6)
KINDS = {
    0: PartCost(fixed_s=3e-3, request_s=2e-5, context_s=1e-7, prompt_s=4e-6),
    1: PartCost(fixed_s=4e-3, request_s=3e-5, context_s=2e-8, prompt_s=5e-6),
}
SHAPES = [(b, 0, b * length) for b in (1, 8, 64) for length in (64, 512)] + [(0, 256, 0)]
"""(decoding requests, prompt tokens, context tokens)"""


def seconds(costs: Sequence[PartCost], shape: tuple[int, int, int]) -> float:
    requests, prompt, context = shape
    return sum(
        (cost.fixed_s + cost.request_s * requests + cost.context_s * context) * bool(requests)
        + cost.prompt_s * prompt
        for cost in costs
    )


def stage_samples(part: Part, kinds: Sequence[int]) -> list[SweepSample]:
    costs = [STEP, *(KINDS[kind] for kind in kinds[part.first : part.end])]
    if part.first == 0:
        costs.append(EMBEDDING)
    if part.end == len(kinds):
        costs.append(HEAD)
    return [
        SweepSample(requests, context, prompt, 0, seconds(costs, (requests, prompt, context)))
        for requests, prompt, context in SHAPES
    ]


def found_costs(kinds: tuple[int, ...]) -> ModelCosts:
    times = {part: times_of(stage_samples(part, kinds)) for part in parts_to_measure(kinds)}
    parts = ModelParts(kinds, tuple(range(len(kinds))), 7, 8)
    return costs_of(times, parts)


def is_like(found: PartCost, expected: PartCost) -> bool:
    names = ("fixed_s", "request_s", "context_s", "prompt_s")
    return all(
        getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-6, abs=1e-12)
        for name in names
    )


@pytest.mark.parametrize(
    "kinds", [(0,) * 3, (0,) * 8, (0, 1) * 4, (1, 0, 0, 0, 0, 1), (0, 0, 1, 0, 0, 1, 0)]
)
def test_parts_are_told_apart(kinds: tuple[int, ...]) -> None:
    found = found_costs(kinds)
    assert is_like(found.step, STEP)
    middle = set(kinds[1:-1])
    for kind, cost in zip(kinds, found.layers, strict=True):
        if kind in middle:
            assert is_like(cost, KINDS[kind]), kind
    if kinds[0] in middle:
        assert is_like(found.embedding, EMBEDDING)
    if kinds[-1] in middle:
        assert is_like(found.head, HEAD)
    assert found.layer_bytes == tuple(range(len(kinds)))
    assert (found.embedding_bytes, found.head_bytes) == (7, 8)


def test_ends_of_a_kind_of_their_own_are_right_as_a_whole() -> None:
    """What cannot be told apart always goes to the same stage."""
    kinds = (1, 0, 0, 0, 0)
    found = found_costs(kinds)
    whole = (found.step, found.embedding, found.layers[0])
    for shape in SHAPES:
        assert seconds(whole, shape) == pytest.approx(seconds([STEP, EMBEDDING, KINDS[1]], shape))


def test_noise_gives_no_negative_cost() -> None:
    times = {(1, 64, 0, 0): 0.5, (8, 512, 0, 0): 0.4, (64, 4096, 0, 0): 0.3, (0, 0, 16, 0): -1e-9}
    found = fit(times)
    assert min(found.fixed_s, found.request_s, found.context_s, found.prompt_s) >= 0
    assert found.fixed_s == pytest.approx(0.4)


def test_a_device_too_slow_for_a_chunk_is_told_by_its_decodes() -> None:
    assert fit({(1, 0, 0, 0): 2.0, (2, 0, 0, 0): 3.0}).prompt_s == pytest.approx(1.0)


def test_kinds_of_layers(tmp_path: Path) -> None:
    def kinds(family: str, **changes: Any) -> tuple[int, ...]:
        return model_parts(build_model(family, tmp_path / family, **changes), "float32").kinds

    assert kinds("llama") == (0, 0, 0, 0)
    assert kinds("gemma2") == (0, 1, 0, 1)  # windows
    assert kinds("qwen3_moe") == (0, 1, 0, 0)  # experts


def test_sizes_are_those_of_the_weights(tmp_path: Path) -> None:
    folder = build_model("llama", tmp_path)
    found = model_parts(folder, "float32")
    whole = sum(found.layer_bytes) + found.embedding_bytes + found.head_bytes
    assert whole == inspect_model(folder).weights_bytes


def test_a_part_is_a_stage_with_as_many_blocks_as_the_others(tmp_path: Path) -> None:
    folder = build_model("llama", tmp_path)
    info = inspect_model(folder)
    config = EngineConfig(
        model=str(folder),
        served_model_name="m",
        layer_split=(4,),
        max_model_len=100_000,
        max_num_seqs=5,
        device="cuda",
        cuda=CudaDevice(gpus=(3,), block_bytes=(1,), kv_copies="daemon"),
        kv_cache_memory_bytes=None,
    )
    counts = set()
    for part, split in (
        (Part(0, 1), (1, 3)),
        (Part(0, 3), (3, 1)),
        (Part(3, 4), (3, 1)),
        (Part(1, 2), (1, 1, 2)),
    ):
        found, stage = config_of(config, part, info)
        assert found.layer_split == split
        assert found.layer_split[stage] == part.end - part.first
        assert found.cuda is not None
        assert found.cuda.gpus == (3,) * len(split)
        assert (found.cuda.kv_copies, found.kv_offloading_bytes) == ("stage", 0)
        counts.add(found.pool_bytes / found.cuda.block_bytes[stage])
    assert counts == {5 * 32}  # of 512 tokens each


def small_shape(folder: Path) -> Path:
    built = build_model("llama", folder / "built")
    (folder / "bare").mkdir()
    shutil.copy(built / "config.json", folder / "bare")
    return folder / "bare"


SMALL: dict[str, Any] = {
    "load_format": "dummy",
    "max_model_len": 64,
    "max_num_seqs": 2,
    "max_num_batched_tokens": 16,
}


def test_stages_on_the_cpu_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "_SWEEP_S", 0.05)
    config = EngineConfig(
        model=str(small_shape(tmp_path)), served_model_name="m", layer_split=(4,), **SMALL
    )
    found = measure(config)
    assert len(found.layers) == len(found.layer_bytes) == 4


@pytest.mark.parametrize("copies", ["stage", "daemon"])
def test_stages_on_a_gpu_are_measured_and_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copies: str
) -> None:
    """As its launcher would have it: the pool's size open, a host pool, no run directory."""
    monkeypatch.setattr(measuring, "_SWEEP_S", 0.05)
    cuda = CudaDevice(gpus=(0,), block_bytes=(1,), attention_backend="reference", kv_copies=copies)
    config = EngineConfig(
        model=str(small_shape(tmp_path)),
        served_model_name="m",
        layer_split=(4,),
        device="cuda",
        cuda=cuda,
        kv_cache_memory_bytes=None,
        **SMALL,
    )
    with simulated(tmp_path / "gpu") as process:
        found = measure(config)
        assert len(found.layers) == 4
        assert process.machine.held_bytes(0) == 0
        process.close()
