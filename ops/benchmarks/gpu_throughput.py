"""What it costs to be many processes: PipeMax with one stage against a plain loop in one process.

    python ops/benchmarks/gpu_throughput.py [--findings OUT] [--rehearse]

The same 8B-shaped bfloat16 model with random weights, the same attention kernels and CUDA graphs,
the same requests, all of equal lengths and submitted at once, on the same GPU one after the other.
The KV pool has no cap on either side. `single_process_cuda.py` is the plain loop. Both sides do the
work twice after a warm-up; the better one counts. Compared are output tokens per second of the
whole work, prompts included, and of decode steps that had all requests in them.
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from gpu_common import (
    engine_options,
    kv_token_bytes,
    run,
    shape_for,
    weights_bytes,
    write_model,
)
from gpu_device import total_bytes
from gpu_findings import FindingsWriter
from live_system import Lengths, running

from pipemax.services.tiny_model import ModelShape

ROUNDS = 2
TARGET, AIM = 0.8, 0.95
OWN_BYTES = 4 * 10**9
"""Of a GPU's memory neither weights nor KV: context, kernels, activations, what is kept free."""


@dataclass(frozen=True, slots=True)
class Size:
    requests: int
    prompt_tokens: int
    output_tokens: int

    @property
    def output(self) -> int:
        return self.requests * self.output_tokens


FULL = Size(128, 256, 512)
SMALL = Size(6, 24, 20)


def size_for(shape: ModelShape, gpu_bytes: int) -> Size | None:
    """As many requests as both sides have room for; None where the model itself has none."""
    room_bytes = gpu_bytes - weights_bytes(shape) - OWN_BYTES
    each_bytes = kv_token_bytes(shape) * (FULL.prompt_tokens + FULL.output_tokens)
    requests = min(FULL.requests, room_bytes // each_bytes)
    if requests < 8:
        return None
    return Size(requests, FULL.prompt_tokens, FULL.output_tokens)


def plain(model: Path, size: Size, out: Path, *, rehearse: bool) -> dict[str, Any]:
    """Runs the loop in a process of its own, so that its memory is free afterwards."""
    script = Path(__file__).with_name("single_process_cuda.py")
    command = [
        sys.executable, str(script), "--model", str(model), "--requests", str(size.requests),
        "--prompt", str(size.prompt_tokens), "--output", str(size.output_tokens),
        "--rounds", str(ROUNDS), "--json", str(out), *(["--rehearse"] if rehearse else []),
    ]  # fmt: skip
    subprocess.run(command, check=True)
    result: dict[str, Any] = json.loads(out.read_text())
    return result


def system(model: Path, size: Size, out: Path, *, rehearse: bool) -> dict[str, Any]:
    """The same of a running system. `decode_tokens_per_s` of its better round."""
    settings: dict[str, Any] = {
        "max_model_len": size.prompt_tokens + size.output_tokens,
        "max_num_seqs": size.requests,
        "max_num_batched_tokens": 2048,
        "kv_offloading_size": "0",
        **({"kv_cache_memory_bytes": "64MiB"} if rehearse else {}),
    }
    work = [Lengths(size.prompt_tokens, size.output_tokens)] * size.requests
    spans = []
    options = engine_options(model, 1, rehearse=rehearse, **settings)
    with running("bench-throughput", options, out) as live:
        live.generate([Lengths(size.prompt_tokens, 8)] * size.requests)
        for number in range(ROUNDS):
            started_s = time.monotonic()
            live.generate(work, seed=1 + number)
            spans.append((started_s, time.monotonic()))
    steps = json.loads(out.read_text())["steps"]
    return {
        "seconds": [end - start for start, end in spans],
        "decode_tokens_per_s": max(full_batch_rate(steps, span, size.requests) for span in spans),
    }


def full_batch_rate(steps: list[list[float]], span: tuple[float, float], requests: int) -> float:
    """Tokens per second of neighbouring steps that each decoded all requests and nothing else; 0
    if there are none. `steps` as in `recording_coordinator.py`."""
    within = [step for step in steps if span[0] <= step[0] <= span[1]]
    full = [step[2] == requests and not step[4] for step in within]
    seconds = [
        late[0] - early[0]
        for (early, first), (late, second) in pairwise(zip(within, full, strict=True))
        if first and second
    ]
    return requests * len(seconds) / sum(seconds) if seconds else 0.0


def part(asked: argparse.Namespace, found: FindingsWriter, folder: Path) -> None:
    shape = shape_for(asked.rehearse)
    size = SMALL if asked.rehearse else size_for(shape, total_bytes())
    if size is None:
        found.skip(f"the GPU has no room for an 8B model: {total_bytes() / 1e9:.0f} GB")
        return
    model = write_model(folder / "model", shape)
    loop = plain(model, size, folder / "plain.json", rehearse=asked.rehearse)
    loop_s = loop["prefill_s"] + loop["decode_s"]
    loop_decode = size.requests * loop["steps"] / loop["decode_s"]
    of = f"{size.requests} requests of {size.prompt_tokens} and {size.output_tokens} tokens"
    found.figure("plain loop", size.output / loop_s, "output tokens/s", note=of)
    found.figure("plain loop, decode", loop_decode, "output tokens/s")
    ours = system(model, size, folder / "steps.json", rehearse=asked.rehearse)
    ours_s = min(ours["seconds"])
    found.figure("pipemax, one stage", size.output / ours_s, "output tokens/s")
    found.figure("pipemax, one stage, decode", ours["decode_tokens_per_s"], "output tokens/s")
    target = None if asked.rehearse else TARGET
    aim = f"aim {AIM}"
    found.figure("pipemax to plain loop", loop_s / ours_s, at_least=target, note=aim)
    found.figure(
        "pipemax to plain loop, decode",
        ours["decode_tokens_per_s"] / loop_decode,
        at_least=target,
        note=aim,
    )


if __name__ == "__main__":
    sys.exit(run(__doc__, part))
