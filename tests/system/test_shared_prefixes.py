"""A system prompt that all requests have in common is computed once."""

import random
from pathlib import Path
from typing import Any

import pytest

from pipemax.client import SamplingParams, Submit
from pipemax.proto.messages.ingest import Status
from support.local_system import LocalSystem, small_config
from support.model_zoo import build_model

COUNT = 200
SYSTEM_PROMPT_TOKENS = 256
MOST_COMPUTED = 0.30
"""Of the prefill tokens without sharing."""


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model("llama", tmp_path_factory.mktemp("llama"))


def submits() -> list[Submit]:
    draw = random.Random(11)
    common = tuple(draw.randrange(3, 512) for _ in range(SYSTEM_PROMPT_TOKENS))
    return [
        Submit(
            request_id=f"r{index}",
            prompt_token_ids=(*common, *(draw.randrange(3, 512) for _ in range(1 + index % 24))),
            sampling=SamplingParams(
                temperature=0.0, max_tokens=4 + index % 8, n=1 + (index % 50 == 0)
            ),
        )
        for index in range(COUNT)
    ]


def run(model_dir: Path, **settings: Any) -> tuple[dict[str, list[tuple[int, ...]]], Status]:
    config = small_config(model_dir, stages=2, max_model_len=320, **settings)
    found: dict[str, list[tuple[int, ...]]] = {}
    with LocalSystem(config) as system, system.client() as client:
        for submit in submits():
            client.submit(submit)
        while len(found) < COUNT:
            completion = client.poll(60)
            assert completion is not None
            assert completion.error is None
            more = [choice.token_ids for choice in completion.more_choices]
            found[completion.request_id] = [completion.token_ids, *more]
        return found, client.status()


def test_a_common_system_prompt_costs_a_fraction_and_changes_no_token(model_dir: Path) -> None:
    without, plain = run(model_dir, device_blocks=800, enable_prefix_caching=False)
    assert plain.prefix_hit_tokens == 0
    # Ample room; and so little that most have to wait for some.
    for device_blocks in (800, 40):
        shared, status = run(model_dir, device_blocks=device_blocks)
        assert shared == without
        assert status.prompt_tokens == plain.prompt_tokens
        computed = status.prompt_tokens - status.prefix_hit_tokens + status.recomputed_tokens
        assert computed <= MOST_COMPUTED * plain.prompt_tokens
