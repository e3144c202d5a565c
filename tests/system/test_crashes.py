"""Processes killed in the middle of a batch: the batch ends with the same tokens."""

import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from pipemax.client import Client
from pipemax.proto.messages.ingest import Status
from support.background import Background
from support.local_system import LocalSystem, greedy, small_config, tokens_of
from support.model_zoo import build_model, reference_tokens

Work = tuple[Path, list[list[int]], list[int], list[list[int]]]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    model_dir = build_model("llama", tmp_path_factory.mktemp("llama"))
    draw = random.Random(11)
    prompts = [[draw.randrange(3, 512) for _ in range(draw.randrange(1, 200))] for _ in range(20)]
    for prompt in prompts[::3]:  # these share blocks
        prompt[:90] = prompts[1][: min(90, len(prompt))]
    counts = [draw.randrange(15, 65) for _ in prompts]
    return model_dir, prompts, counts, reference_tokens(model_dir, prompts, counts)


def wait_for(client: Client, condition: Callable[[Status], bool]) -> Status:
    deadline = time.monotonic() + 60
    while not condition(status := client.status()):
        assert time.monotonic() < deadline, status
        time.sleep(0.01)
    return status


def has_produced(tokens: float, status: Status) -> bool:
    return status.generation_tokens > tokens


@pytest.mark.parametrize(
    "blows",
    [
        (["stage-0"], ["stage-1", "kv-daemon"]),
        (["kv-daemon"], ["stage-0", "stage-1"]),
        (["stage-1"], ["coordinator"]),
        *(
            pytest.param((victims, victims), marks=pytest.mark.full)
            for victims in (
                ["stage-0"],
                ["stage-1"],
                ["kv-daemon"],
                ["coordinator"],
                ["stage-1", "kv-daemon"],
                ["stage-0", "stage-1"],
                ["coordinator", "stage-1"],
                ["coordinator", "kv-daemon"],
            )
        ),
    ],
    ids=lambda blows: " then ".join(map("+".join, blows)),
)
def test_tokens_stay_the_same(work: Work, blows: tuple[list[str], list[str]]) -> None:
    model_dir, prompts, counts, expected = work
    config = small_config(model_dir, stages=2, device_blocks=40, max_num_batched_tokens=128)
    with LocalSystem(config) as system, system.client() as client, system.client() as watcher:
        system.wait_ready(watcher)
        batch = Background(lambda: client.generate(prompts, [greedy(n) for n in counts]))
        for share, victims in zip((0.2, 0.6), blows, strict=True):
            wait_for(watcher, partial(has_produced, share * sum(counts)))
            for name in victims:
                system.kill(name)
            for name in victims:
                system.start(name)
        completions = batch.outcome()
        status = watcher.status()
        assert any("coordinator" in victims for victims in blows) or status.epoch >= 3
        assert status.device_blocks_used == 0
        wait_for(watcher, lambda s: s.host_blocks_used == 0)
    assert isinstance(completions, list)
    assert tokens_of(completions) == expected


def test_host_blocks_survive_a_stage(work: Work) -> None:
    """What was stored is loaded again, not recomputed."""
    model_dir, prompts, counts, expected = work
    config = small_config(model_dir, stages=2, device_blocks=40, max_num_batched_tokens=128)
    with LocalSystem(config) as system, system.client() as client, system.client() as watcher:
        system.wait_ready(watcher)
        batch = Background(lambda: client.generate(prompts, [greedy(n) for n in counts]))
        before = wait_for(watcher, partial(has_produced, 0.5 * sum(counts)))
        system.kill("stage-0")
        system.start("stage-0")
        completions = batch.outcome()
        after = watcher.status()
    assert isinstance(completions, list)
    assert tokens_of(completions) == expected
    stored_tokens = before.host_blocks_used * config.block_size
    assert stored_tokens > 0
    assert after.recomputed_tokens - before.recomputed_tokens < stored_tokens / 2
