"""Log probabilities of prompts and outputs equal those of transformers, with prompts in pieces, KV
that comes and goes, and a last stage that dies."""

import random
from pathlib import Path

import pytest
import torch
import transformers

from pipemax.client import Completion, SamplingParams
from pipemax.proto.messages.ingest import PositionLogprobs
from support.background import Background
from support.fake_cuda import FakeMachine
from support.local_system import LocalSystem, cuda_config, small_config
from support.model_zoo import build_model

TOP = 3


def check(positions: tuple[PositionLogprobs, ...], expected: torch.Tensor) -> None:
    """`expected` float64 `[len(positions), vocab]`."""
    assert len(positions) == len(expected)
    for position, row in zip(positions, expected, strict=True):
        own, *likeliest = position
        assert len(likeliest) == TOP
        ids = [token.token_id for token in position]
        logprobs = torch.tensor([token.logprob for token in position], dtype=torch.float64)
        assert torch.allclose(logprobs, row[ids], atol=1e-4, rtol=0)
        assert [token.rank for token in likeliest] == [1, 2, 3]
        assert torch.allclose(row[ids[1:]], row.topk(TOP).values, atol=1e-4, rtol=0)
        assert abs(own.rank - 1 - int((row > row[own.token_id]).sum())) <= 1  # close ones may swap
        assert own.text == f"token_id:{own.token_id}"


@pytest.mark.parametrize("on_gpus", [False, True], ids=["cpu", "simulated-gpus"])
def test_logprobs_equal_transformers(tmp_path: Path, on_gpus: bool) -> None:
    model_dir = build_model("qwen3", tmp_path)
    draw = random.Random(5)
    prompts = [[draw.randrange(3, 512) for _ in range(draw.randrange(1, 90))] for _ in range(12)]
    sampling = SamplingParams(
        temperature=0.8, logprobs=TOP, prompt_logprobs=TOP, max_tokens=24, presence_penalty=0.5
    )
    sizes = {"device_blocks": 24, "max_model_len": 256, "max_num_batched_tokens": 64}
    sizes["max_num_seqs"] = 7  # also the most rows of logits a step may have
    if on_gpus:
        config = cuda_config(model_dir, gpus=(0, 0), **sizes)
        system = LocalSystem(config, FakeMachine(num_gpus=1))
    else:
        system = LocalSystem(small_config(model_dir, stages=2, **sizes))
    with system, system.client() as client, system.client() as watcher:
        system.wait_ready(watcher)
        batch = Background(lambda: client.generate(prompts, sampling))
        while watcher.status().generation_tokens < 60:
            assert batch.is_alive()
        system.kill("stage-1")
        system.start("stage-1")
        completions = batch.outcome()
    assert isinstance(completions, list)
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype="auto").eval()
    for prompt, completion in zip(prompts, completions, strict=True):
        assert isinstance(completion, Completion)
        assert completion.error is None
        whole = torch.tensor([[*prompt, *completion.token_ids]])
        with torch.inference_mode():
            table = torch.log_softmax(model(whole).logits[0].double(), dim=-1)
        (first,), *rest = completion.prompt_logprobs or ()
        assert (first.token_id, first.logprob, first.rank) == (prompt[0], None, 0)
        assert [position[0].token_id for position in rest] == prompt[1:]
        check(tuple(rest), table[: len(prompt) - 1])
        outputs = completion.logprobs or ()
        assert tuple(position[0].token_id for position in outputs) == completion.token_ids
        check(outputs, table[len(prompt) - 1 : -1])
