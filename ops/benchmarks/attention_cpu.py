"""Which way to attend over the paged pool on a CPU: prints times and ratios.

    python ops/benchmarks/attention_cpu.py [--threads N] [--rounds N]

Decode (one query per request), three ways:

- padded: gather every request's context into one `[batch, longest, kv_heads, head_dim]` tensor,
  then torch's attention with a mask;
- per request: gather one request's context after the other, torch's attention for each;
- in place: the compiled kernel that reads the blocks where they are.

Prefill, a chunk of several prompts on top of a context, two ways: gather each context and torch's
attention for each request, or the compiled kernel. All ways take turns within one run; the figure
is each one's median.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial

import numba
import numpy as np
import torch

from pipemax.proto.geometry import BlockGeometry
from pipemax.services.bench.attention import (
    BLOCK_SIZE,
    HEAD_DIM,
    decode_batch,
    gathered,
    in_place,
    padded,
    per_request,
    step_of,
)

BATCH, KV_HEADS, LAYERS = 64, 8, 2


def medians(ways: dict[str, Callable[[], torch.Tensor]], rounds: int) -> dict[str, float]:
    """Milliseconds of each way; one uncounted round first, in which all must agree."""
    first, *others = [way().float() for way in ways.values()]
    for other in others:
        torch.testing.assert_close(first, other, atol=3e-2, rtol=3e-2)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def compare_decode(rounds: int) -> None:
    print(f"\nDecode: batch {BATCH}, {KV_HEADS} KV heads of {HEAD_DIM}, blocks of {BLOCK_SIZE}\n")
    print(
        "| contexts | heads | dtype | padded ms | per request ms | in place ms "
        "| padded / in place | per request / in place |"
    )
    print("|---|---|---|---|---|---|---|---|")
    mixed = np.random.default_rng(1).integers(32, 993, BATCH).tolist()
    for name, lens in (("all 512", [512] * BATCH), ("32 to 992", mixed)):
        batch, tables, num_blocks = decode_batch(lens)
        ends = torch.tensor(lens)
        for heads in (KV_HEADS, 4 * KV_HEADS):
            for dtype in (torch.float32, torch.bfloat16):
                geometry = BlockGeometry(LAYERS, BLOCK_SIZE, KV_HEADS, HEAD_DIM, "float32")
                pool = torch.randn(num_blocks, *geometry.block_shape).to(dtype)
                query = torch.randn(BATCH, heads, HEAD_DIM).to(dtype)
                ms = medians(
                    {
                        "padded": partial(padded, pool, tables, ends, query),
                        "per request": partial(per_request, pool, tables, ends, query),
                        "in place": partial(in_place, pool, batch, query),
                    },
                    rounds,
                )
                best = ms["in place"]
                print(
                    f"| {name} | {heads} | {str(dtype)[6:]} | {ms['padded']:.2f} | "
                    f"{ms['per request']:.2f} | {best:.2f} | {ms['padded'] / best:.1f} | "
                    f"{ms['per request'] / best:.1f} |"
                )


def compare_prefill(rounds: int) -> None:
    heads, kv_heads = 12, 4
    print(f"\nPrefill: {heads} heads, {kv_heads} KV heads of {HEAD_DIM}\n")
    print("| requests | tokens before | new tokens | dtype | gather ms | in place ms | ratio |")
    print("|---|---|---|---|---|---|---|")
    cases = [(1, before, new) for before in (0, 128, 1024) for new in (2, 8, 32, 128, 512)]
    for count, before, new in [*cases, (1, 0, 2048), (16, 0, 128), (16, 512, 16)]:
        items = [(new, before)] * count
        batch, tables, num_blocks = step_of(items)
        for dtype in (torch.float32, torch.bfloat16):
            shape = (num_blocks, LAYERS, 2, BLOCK_SIZE, kv_heads, HEAD_DIM)
            pool = torch.randn(shape).to(dtype)
            query = torch.randn(count * new, heads, HEAD_DIM).to(dtype)
            ways = {
                "gather": partial(gathered, pool, tables, items, query),
                "in place": partial(in_place, pool, batch, query),
            }
            ms = medians(ways, rounds)
            print(
                f"| {count} | {before} | {new} | {str(dtype)[6:]} | {ms['gather']:.3f} | "
                f"{ms['in place']:.3f} | {ms['gather'] / ms['in place']:.2f} |"
            )


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of every way")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds per case")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    print(
        f"python {platform.python_version()}, torch {torch.__version__}, numba "
        f"{numba.__version__}, {platform.machine()}, {arguments.threads} thread(s), "
        f"{arguments.rounds} rounds"
    )
    compare_decode(arguments.rounds)
    compare_prefill(arguments.rounds)


if __name__ == "__main__":
    main()
