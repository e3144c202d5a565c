"""Systems of modelled GPUs for tests: real processes, sizes far beyond this machine's."""

import random
from dataclasses import replace
from typing import Any

from pipemax.client import Client
from pipemax.kv_daemon.cpu_engine import CpuEngine
from pipemax.kv_daemon.events import StartCopy
from pipemax.kv_daemon.main import body as daemon_body
from pipemax.proto.config import EngineConfig
from pipemax.proto.geometry import split_layers
from pipemax.services.cli.options import EngineOptions
from pipemax.services.engine_config import build_config
from pipemax.stage_worker.modelled.catalogue import load_catalogue
from pipemax.stage_worker.modelled.marks import continuation
from support.local_system import greedy, tokens_of

MODEL = "llama-2-13b"
"""Fits one L20, and eight."""
BLOCK_SIZE = 16


def modelled_options(*, stages: int, device_blocks: int, host_blocks: int, **flags: Any) -> Any:
    """EngineOptions whose pools are given in blocks."""
    shape = load_catalogue().model(MODEL)
    layer_bytes = round(shape.kv_token_bytes(1, 2.0) * BLOCK_SIZE)
    most = max(split_layers(shape.num_layers, stages))
    values: dict[str, Any] = {
        "device": "modelled:l20",
        "model": MODEL,
        "pipeline_parallel_size": stages,
        "block_size": BLOCK_SIZE,
        "modelled_time_scale": 0.05,
        "max_model_len": 320,
        "max_num_batched_tokens": 256,
        "kv_cache_memory_bytes": str(device_blocks * most * layer_bytes),
        "kv_offloading_size": str(host_blocks * shape.num_layers * layer_bytes),
        **flags,
    }
    return EngineOptions(**values)


def modelled_config(**settings: Any) -> EngineConfig:
    return build_config(modelled_options(**settings), "t")


class Work:
    """Greedy requests, and the output that every correct run gives: known without running any."""

    def __init__(self, count: int, most_outputs: int, vocab_size: int, seed: int = 7) -> None:
        draw = random.Random(seed)
        self.prompts = [
            [draw.randrange(3, 30_000) for _ in range(draw.randrange(20, 200))]
            for _ in range(count)
        ]
        self.counts = [draw.randrange(most_outputs // 2, most_outputs) for _ in range(count)]
        self.num_outputs = sum(self.counts)
        self.expected = [
            continuation(prompt, n, vocab_size)
            for prompt, n in zip(self.prompts, self.counts, strict=True)
        ]

    def run(self, client: Client) -> list[list[int]]:
        parameters = [greedy(n, ignore_eos=True) for n in self.counts]
        return tokens_of(client.generate(self.prompts, parameters))


class _WrongBlockEngine(CpuEngine):
    """Brings one host block further than asked for, now and then."""

    loads = 0

    def start(self, copy: StartCopy) -> None:
        if copy.direction == "load":
            self.loads += 1
            if self.loads % 5 == 0:
                run = copy.runs[0]
                moved = run.host_block + 1 if run.host_block == 0 else run.host_block - 1
                copy = replace(copy, runs=(run._replace(host_block=moved), *copy.runs[1:]))
        super().start(copy)


def daemon_with_wrong_blocks(run_dir: Any, index: int) -> None:
    """The KV daemon's body with a bug."""
    from pipemax.kv_daemon import main

    main.CpuEngine = _WrongBlockEngine  # type: ignore[misc,assignment]
    daemon_body(run_dir, index)
