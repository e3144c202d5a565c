"""The same request gives the same tokens whatever runs beside it and wherever its KV has been."""

import random
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pipemax.client import SamplingParams, Submit
from pipemax.coordinator.policy import DEFAULT_POLICY
from support.local_system import LocalSystem, small_config
from support.model_zoo import build_model

COUNT = 16
RULES: tuple[dict[str, Any], ...] = (
    {},
    {"presence_penalty": 0.8, "frequency_penalty": 0.4},
    {"repetition_penalty": 1.4, "logit_bias": {5: 4.0, 9: -100.0}},
    {"allowed_token_ids": tuple(range(2, 512, 3)), "frequency_penalty": -0.5},
)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model("qwen3", tmp_path_factory.mktemp("qwen3"))


def submits() -> list[Submit]:
    """Half with seeds of their own, half without; all sampled."""
    draw = random.Random(3)
    return [
        Submit(
            request_id=f"r{index}",
            prompt_token_ids=tuple(draw.randrange(3, 512) for _ in range(draw.randrange(1, 120))),
            sampling=SamplingParams(
                temperature=draw.choice([0.0, 0.7, 1.3]),
                top_k=draw.choice([0, 20]),
                top_p=draw.choice([1.0, 0.9]),
                min_p=draw.choice([0.0, 0.02]),
                seed=index if index % 2 else None,
                max_tokens=draw.randrange(8, 48),
                min_tokens=4,
                **(draw.choice(RULES)),
            ),
        )
        for index in range(COUNT)
    ]


def run(model_dir: Path, order: int | None, **settings: Any) -> dict[str, tuple[int, ...]]:
    todo = submits()
    if order is not None:
        random.Random(order).shuffle(todo)
    config = small_config(model_dir, max_model_len=256, **settings)
    with LocalSystem(config) as system, system.client() as client:
        for submit in todo:
            client.submit(submit)
        found: dict[str, tuple[int, ...]] = {}
        while len(found) < COUNT:
            completion = client.poll(60)
            assert completion is not None
            assert completion.error is None
            found[completion.request_id] = completion.token_ids
    return found


TOGETHER: tuple[dict[str, Any], ...] = (
    {"stages": 3, "device_blocks": 24, "max_num_batched_tokens": 32, "activation_transport": "tcp"},
    {"stages": 2, "device_blocks": 48, "block_size": 8, "policy": DEFAULT_POLICY, "warm_up_s": 0.1},
    {
        "stages": 2,
        "device_blocks": 24,
        "host_blocks": 0,
        "micro_batches": 3,
        "policy": "fcfs",
        "prefill": "phases",
    },
    {"stages": 1, "device_blocks": 24, "max_num_seqs": 3, "micro_batches": 2},
)
ONE_BY_ONE: tuple[dict[str, Any], ...] = (
    {"stages": 2, "device_blocks": 24},
    {"stages": 3, "device_blocks": 24, "max_num_batched_tokens": 32},
    {"stages": 2, "device_blocks": 24, "host_blocks": 0},
    {"stages": 2, "device_blocks": 48, "block_size": 8, "activation_transport": "tcp"},
    {"stages": 2, "device_blocks": 24, "policy": DEFAULT_POLICY, "warm_up_s": 0.1},
    {"stages": 2, "device_blocks": 24, "policy": "fcfs", "prefill": "phases"},
)


@pytest.mark.parametrize(
    "variants",
    [
        pytest.param(TOGETHER, id="several at once"),
        pytest.param(ONE_BY_ONE, id="one by one", marks=pytest.mark.full),
    ],
)
def test_stages_pools_order_policy_and_transport_do_not_change_tokens(
    model_dir: Path, variants: tuple[dict[str, Any], ...]
) -> None:
    plain = run(model_dir, None, stages=1, device_blocks=400, host_blocks=0)
    assert len({len(tokens) for tokens in plain.values()}) > 4
    for order, settings in enumerate(variants):
        assert run(model_dir, order, **settings) == plain, settings


def test_the_system_seed_changes_unseeded_requests_only(model_dir: Path) -> None:
    one = run(model_dir, None, stages=1, device_blocks=400)
    other = run(model_dir, None, stages=1, device_blocks=400, seed=7)
    sampled = {s.request_id: s.sampling for s in submits() if s.sampling.temperature > 0}
    for name, sampling in sampled.items():
        if sampling.seed is not None:
            assert one[name] == other[name]
    changed = [n for n, s in sampled.items() if s.seed is None and one[n] != other[n]]
    assert changed


def test_choices_are_those_of_the_seeds_that_follow(model_dir: Path) -> None:
    prompt = list(range(5, 60))
    params = SamplingParams(temperature=1.2, max_tokens=12, frequency_penalty=0.5, seed=7)
    several = msgspec.structs.replace(params, n=3, logprobs=0, prompt_logprobs=0)
    config = small_config(model_dir, max_model_len=256, stages=2, device_blocks=24)
    with LocalSystem(config) as system, system.client() as client:
        (together,) = client.generate([prompt], several)
        alone = client.generate(
            [prompt] * 3, [msgspec.structs.replace(params, seed=7 + i) for i in range(3)]
        )
    assert [c.token_ids for c in together.choices] == [c.token_ids for c in alone]
    assert len({c.token_ids for c in together.choices}) == 3
    assert [len(c.logprobs or ()) for c in together.choices] == [12] * 3
    assert len(together.prompt_logprobs or ()) == len(prompt)
