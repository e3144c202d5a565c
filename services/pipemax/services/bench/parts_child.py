"""Kernels on one core: `python -m pipemax.services.bench.parts_child CORE`, which speaks as
`cores_child` does and knows its tasks, too."""

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipemax.proto.memory import SharedMemory
from pipemax.proto.messages.control import RowExtras, SampleRow, SampleRules
from pipemax.proto.messages.types import pack_i32
from pipemax.services.bench import cores_child
from pipemax.services.bench.attention import (
    BLOCK_SIZE,
    decode_batch,
    in_place,
    step_of,
)
from pipemax.services.bench.cores_child import mean_s
from pipemax.stage_worker.sampling import Sampler

_POOL_BYTES = 512 * 2**20
"""About as much KV as is read before any is read again: more than a cache holds."""
_PROMPT_IDS = 64


def mapped_hugely(address: int, smaps: Path = Path("/proc/self/smaps")) -> int:
    """Bytes in huge pages of the mapping that holds an address, as the kernel counts them; 0 where
    it does not say."""
    inside = False
    for line in smaps.read_text().splitlines():
        name, *values = line.split()
        if "-" in name:
            begin, end = (int(number, 16) for number in name.split("-"))
            inside = begin <= address < end
        elif inside and name == "ShmemPmdMapped:":
            return int(values[0]) * 1024
    return 0


def decode(task: dict[str, Any]) -> dict[str, float]:
    """In-place attention of `batch` requests with contexts spread evenly from `shortest` to
    `longest`, each time over another layer: seconds, and bytes of KV read, of a call. And what the
    pool's memory gives when it is read in order, and how many bytes of it lie in huge pages."""
    lens = np.linspace(task["shortest"], task["longest"], task["batch"]).astype(int).tolist()
    batch, _, num_blocks = decode_batch(lens)
    dtype = getattr(torch, task["dtype"])
    token_bytes = 2 * task["kv_heads"] * task["head_dim"] * dtype.itemsize
    layers = max(1, math.ceil(_POOL_BYTES / (num_blocks * BLOCK_SIZE * token_bytes)))
    shape = (num_blocks, layers, 2, BLOCK_SIZE, task["kv_heads"], task["head_dim"])
    query = torch.randn(task["batch"], task["heads"], task["head_dim"]).to(dtype)
    memory = SharedMemory.create("bench-pool", math.prod(shape) * dtype.itemsize)
    try:
        memory.prefault()
        pool = torch.frombuffer(memory.buffer, dtype=dtype).view(shape)
        found = _read(pool, task["seconds"])
        calls = iter(range(2**62))
        seconds = mean_s(
            lambda: in_place(pool, batch, query, next(calls) % layers), task["seconds"]
        )
    finally:
        memory.close()
    return {"seconds": seconds, "bytes": float(sum(lens) * token_bytes), **found}


def _read(pool: torch.Tensor, seconds: float) -> dict[str, float]:
    words = pool.view(torch.int64).flatten().numpy()
    read_s = mean_s(lambda: cores_child.add_up(words), seconds)
    return {
        "read_bytes_s": words.nbytes / read_s,
        "pool_bytes": float(words.nbytes),
        "huge_bytes": float(mapped_hugely(pool.data_ptr())),
    }


def prompt(task: dict[str, Any]) -> dict[str, float]:
    """Attention of a prompt of `tokens`: seconds, and FLOP of the pairs that see each other, of a
    call."""
    count, heads, head_dim = task["tokens"], task["heads"], task["head_dim"]
    dtype = getattr(torch, task["dtype"])
    batch, _, num_blocks = step_of([(count, 0)])
    pool = torch.randn(num_blocks, 2, 2, BLOCK_SIZE, task["kv_heads"], head_dim).to(dtype)
    query = torch.randn(count, heads, head_dim).to(dtype)
    seconds = mean_s(lambda: in_place(pool, batch, query), task["seconds"])
    return {"seconds": seconds, "flop": 4.0 * heads * head_dim * count * (count + 1) / 2}


def sampler(task: dict[str, Any]) -> dict[str, float]:
    """Sampling `rows` of logits, whose standard deviation is 0.3: seconds, and bytes of logits, of
    a call."""
    rows, vocab, asked = task["rows"], task["vocab"], task["sampling"]
    logits = torch.randn(rows, vocab) * 0.3
    kept = Sampler()
    steps = iter(range(2**62))

    def once() -> None:
        step = next(steps)
        kept.sample_rows([_row(index, step, asked) for index in range(rows)], logits, range(rows))

    return {"seconds": mean_s(once, task["seconds"]), "bytes": 4.0 * rows * vocab}


def _row(index: int, step: int, asked: dict[str, Any]) -> SampleRow:
    extras = None
    penalties = {key: value for key, value in asked.items() if key.endswith("_penalty")}
    if penalties:
        prompt_ids = pack_i32(range(_PROMPT_IDS))
        rules = SampleRules(**penalties, prompt_token_ids=prompt_ids) if step == 0 else None
        extras = RowExtras(request=index, rules=rules)
    return SampleRow(
        item=index,
        seed=index,
        position=step,
        temperature=asked["temperature"],
        top_k=asked.get("top_k", 0),
        top_p=asked.get("top_p", 1.0),
        min_p=0.0,
        extras=extras,
    )


TASKS = {
    **cores_child.TASKS,
    "decode": decode,
    "prompt": prompt,
    "sampler": sampler,
}

if __name__ == "__main__":
    with torch.inference_mode():
        cores_child.serve(TASKS, int(sys.argv[1]))
