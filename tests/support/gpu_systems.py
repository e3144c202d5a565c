"""Small systems for tests on a GPU, all stages on the first; in a rehearsal on a simulated one."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch
import transformers

from pipemax.proto.config import EngineConfig
from support.fake_cuda import FakeMachine
from support.local_system import LocalSystem, cuda_config


@dataclass(frozen=True)
class Way:
    """How stages on a GPU work together."""

    stages: int
    transport: Literal["ipc", "shm", "auto"] = "auto"
    copies: Literal["stage", "daemon"] = "stage"
    graphs: bool = True

    def __str__(self) -> str:
        parts = [f"{self.stages} stages", self.transport, f"copies by {self.copies}"]
        return ", ".join([*parts, "graphs" if self.graphs else "eager"])


def gpu_config(model_dir: Path, way: Way, *, rehearsal: bool, **settings: Any) -> EngineConfig:
    """See `small_config`. A rehearsal attends in plain torch."""
    config = cuda_config(
        model_dir,
        gpus=(0,) * way.stages,
        cuda={
            "kv_copies": way.copies,
            "enforce_eager": not way.graphs,
            "attention_backend": "reference" if rehearsal else "auto",
        },
        **settings,
    )
    return msgspec.structs.replace(config, activation_transport=way.transport)


def gpu_system(config: EngineConfig, *, rehearsal: bool) -> LocalSystem:
    """On the GPU; in a rehearsal on a simulated one."""
    return LocalSystem(config, FakeMachine() if rehearsal else None)


@dataclass(frozen=True)
class Work:
    """Requests and what transformers answers to them."""

    model_dir: Path
    prompts: list[list[int]]
    outputs: list[int]
    """Most tokens of each answer."""
    expected: list[list[int]]


def make_work(
    model_dir: Path, device: torch.device, seed: str, count: int, longest: int, output: int
) -> Work:
    """Greedy answers by `transformers.generate` on `device`. Lengths of prompts and outputs vary;
    the first prompt is one token, the second is `longest`."""
    draw = random.Random(seed)
    lengths = [1, longest]
    lengths += [min(longest, int(draw.lognormvariate(4.2, 0.9)) + 1) for _ in range(count - 2)]
    outputs = [output, 1]
    outputs += [min(output, int(draw.lognormvariate(3.4, 0.7)) + 1) for _ in range(count - 2)]
    prompts = [[draw.randrange(3, 512) for _ in range(length)] for length in lengths]
    return Work(model_dir, prompts, outputs, answers(model_dir, device, prompts, outputs))


@torch.inference_mode()
def answers(
    model_dir: Path, device: torch.device, prompts: list[list[int]], outputs: list[int]
) -> list[list[int]]:
    """See `model_zoo.reference_tokens`, but on `device`. By plain attention: the default is torch's
    in some versions of transformers, which leaves soft-caps out."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        model_dir, dtype="auto", attn_implementation="eager"
    )
    model = model.to(device).eval()
    found = []
    for prompt, limit in zip(prompts, outputs, strict=True):
        ids = torch.tensor([prompt], device=device)
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=limit, do_sample=False
        )
        found.append(out[0, len(prompt) :].tolist())
    return found
