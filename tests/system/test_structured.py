"""Outputs of a model that knows nothing follow their grammars, over stages, a pool too small and a
last stage that dies; with the same seeds they are the same on simulated GPUs."""

import json
import re
from pathlib import Path
from typing import Any

from pipemax.client import Client, Completion, SamplingParams
from pipemax.proto.messages.ingest import StructuredOutputs
from pipemax.services.tiny_model import ModelShape, make_demo_model
from support.background import Background
from support.fake_cuda import FakeMachine
from support.local_system import LocalSystem, cuda_config, small_config

SHAPE = ModelShape(
    num_layers=2, hidden_size=32, intermediate_size=64, num_heads=4, num_kv_heads=2, vocab_size=400
)
SCHEMA = {
    "type": "object",
    "properties": {
        "a": {"enum": ["wet", "dry"]},
        "b": {"type": "boolean"},
        "c": {"const": 1234567},
    },
    "required": ["a", "b", "c"],
    "additionalProperties": False,
}
KINDS: tuple[dict[str, Any], ...] = (
    {"json": SCHEMA},
    {"choice": ("the water", "a stone")},
    {"regex": "[a-z]{20,24}!"},
)
COUNT = 18


def fits(kind: dict[str, Any], text: str) -> bool:
    if "json" in kind:
        found = json.loads(text)
        return found["a"] in ("wet", "dry") and type(found["b"]) is bool and found["c"] == 1234567
    if "regex" in kind:
        return re.fullmatch(kind["regex"], text) is not None
    return text in kind["choice"]


def params(index: int) -> SamplingParams:
    return SamplingParams(
        temperature=1.0,
        seed=index,
        max_tokens=160,
        structured_outputs=StructuredOutputs(**KINDS[index % 3]),
    )


def run(client: Client) -> list[Completion]:
    return client.generate([f"Line {i}:" for i in range(COUNT)], list(map(params, range(COUNT))))


def test_outputs_follow_their_grammars(tmp_path: Path) -> None:
    model_dir = make_demo_model(tmp_path, shape=SHAPE)
    sizes = {"device_blocks": 20, "max_model_len": 256, "max_num_seqs": 8}
    config = small_config(model_dir, stages=2, **sizes)
    with LocalSystem(config) as system, system.client() as client, system.client() as watcher:
        system.wait_ready(watcher)
        batch = Background(lambda: run(client))
        while watcher.status().generation_tokens < 120:
            assert batch.is_alive()
        system.kill("stage-1")
        system.start("stage-1")
        completions = batch.outcome()
    assert isinstance(completions, list)
    for index, completion in enumerate(completions):
        assert completion.finish_reason == "stop", completion
        assert fits(KINDS[index % 3], completion.text), completion.text
    on_gpus = cuda_config(model_dir, gpus=(0, 0), **sizes)
    with LocalSystem(on_gpus, FakeMachine(num_gpus=1)) as system, system.client() as client:
        assert [c.text for c in run(client)] == [c.text for c in completions]
