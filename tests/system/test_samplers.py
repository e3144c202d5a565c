"""Sampler workers change no token and no logprob, however many there are, and whoever dies."""

import random
from pathlib import Path
from typing import Any

import pytest

from pipemax.client import Client, Completion, SamplingParams
from pipemax.proto.config import EngineConfig
from pipemax.proto.messages.ingest import StructuredOutputs
from pipemax.services.tiny_model import ModelShape, make_demo_model
from support.background import Background
from support.fake_cuda import FakeMachine
from support.local_system import LocalSystem, cuda_config, small_config

SHAPE = ModelShape(
    num_layers=2, hidden_size=32, intermediate_size=64, num_heads=4, num_kv_heads=2, vocab_size=400
)
KINDS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.9, "top_p": 0.9, "top_k": 50},
    {"temperature": 0.0, "presence_penalty": 0.8, "repetition_penalty": 1.2},
    {"temperature": 0.7, "frequency_penalty": 0.6, "logprobs": 2, "bad_words": ("a",)},
    {"temperature": 1.0, "prompt_logprobs": 1, "logit_bias": {7: 2.0}, "min_tokens": 9},
    {"temperature": 1.0, "structured_outputs": StructuredOutputs(regex="[a-z]{20,24}!")},
)
COUNT = 30
SIZES = {"device_blocks": 24, "max_model_len": 256, "max_num_seqs": 8}


def params(index: int) -> SamplingParams:
    return SamplingParams(seed=index, max_tokens=24, **KINDS[index % len(KINDS)])


def run(client: Client) -> list[Completion]:
    draw = random.Random(3)
    prompts = [[draw.randrange(10, 390) for _ in range(draw.randrange(1, 50))] for _ in KINDS * 5]
    return client.generate(prompts, list(map(params, range(COUNT))))


def results(completions: list[Completion]) -> list[tuple[Any, ...]]:
    for completion in completions:
        assert completion.error is None, completion.error
    return [(tuple(c.token_ids), c.logprobs, c.prompt_logprobs) for c in completions]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_demo_model(tmp_path_factory.mktemp("demo"), shape=SHAPE)


@pytest.fixture(scope="module")
def expected(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Any, ...]]:
    """Of a last stage that samples itself."""
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("PIPEMAX_RUNTIME_DIR", "PIPEMAX_STATE_DIR"):
            patch.setenv(variable, str(tmp_path_factory.mktemp("s")))
        config = small_config(model_dir, stages=2, **SIZES)
        with LocalSystem(config) as system, system.client() as client:
            system.wait_ready(client)
            return results(run(client))


def check_rows(system: LocalSystem, client: Client) -> None:
    """Every sampler had its share."""
    samplers = client.status().samplers
    assert [s.sampler for s in samplers] == list(range(system.config.sampler_workers))
    assert all(sampler.rows > 0 for sampler in samplers)


def test_one_sampler_gives_the_same(model_dir: Path, expected: list[tuple[Any, ...]]) -> None:
    config = small_config(model_dir, stages=2, sampler_workers=1, **SIZES)
    with LocalSystem(config) as system, system.client() as client:
        system.wait_ready(client)
        check_tokens(results(run(client)), expected)
        check_rows(system, client)


def disturbed(config: EngineConfig, machine: FakeMachine | None, victims: tuple[str, ...]) -> Any:
    """The results of a run in which each of `victims` is killed once."""
    with (
        LocalSystem(config, machine) as system,
        system.client() as client,
        system.client() as watcher,
    ):
        system.wait_ready(watcher)
        batch = Background(lambda: run(client))
        for number, victim in enumerate(victims):
            while watcher.status().generation_tokens < 150 * (number + 1):
                assert batch.is_alive()
            system.kill(victim)
            system.start(victim)
            while watcher.status().epoch < number + 2:
                system.revive()
        while batch.is_alive():
            system.revive()
        completions = batch.outcome()
        assert isinstance(completions, list)
        check_rows(system, watcher)
        return results(completions)


def check_tokens(found: list[tuple[Any, ...]], expected: list[tuple[Any, ...]]) -> None:
    """What is computed again in other pieces has logprobs that differ in the last digits."""
    for (tokens, *logprobs), (wanted, *others) in zip(found, expected, strict=True):
        assert tokens == wanted
        assert [x and len(x) for x in logprobs] == [x and len(x) for x in others]


def test_samplers_and_stages_that_die_change_nothing(
    model_dir: Path, expected: list[tuple[Any, ...]]
) -> None:
    config = small_config(model_dir, stages=2, sampler_workers=2, **SIZES)
    check_tokens(disturbed(config, None, ("sampler-1", "stage-1")), expected)


def test_the_same_on_simulated_gpus(model_dir: Path, expected: list[tuple[Any, ...]]) -> None:
    config = cuda_config(model_dir, gpus=(0, 0), sampler_workers=2, **SIZES)
    machine = FakeMachine(num_gpus=1)
    check_tokens(disturbed(config, machine, ("sampler-0",)), expected)
