"""Attention over the paged pool on a GPU, against the GPU's own copy bandwidth.

    python ops/benchmarks/attention_cuda.py                     every backend that is installed
    python ops/benchmarks/attention_cuda.py --sweep             how to launch the Triton kernel
    python ops/benchmarks/attention_cuda.py --batch 8 --context 8192 --json out.json

Decode: each request brings one token and reads its whole context once. What counts are bytes of K
and V per second, beside what a copy in device memory moves, read and written bytes together. The
step's calls run as one CUDA graph over two layers of a pool many times the size of the L2 cache,
in turn, so that no call finds its K and V there; time is between two events, the median of the
rounds. Blocks are scattered over the pool.

Prefill: prompts in chunks on top of a context; TFLOP/s of the two products, masked ones left out.
"""

import argparse
import itertools
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_findings import FindingsWriter, write_json

from pipemax.proto.errors import ConfigError
from pipemax.proto.geometry import BlockGeometry, Dtype
from pipemax.proto.messages.control import StepPlan
from pipemax.proto.messages.types import pack_i32
from pipemax.stage_worker.attention.device.base import AttentionBackend
from pipemax.stage_worker.attention.device.batch import DeviceStep
from pipemax.stage_worker.attention.device.launch import Launch
from pipemax.stage_worker.attention.device.paged import DevicePagedAttention
from pipemax.stage_worker.attention.device.select import open_attention
from pipemax.stage_worker.dtypes import torch_dtype

TARGET = 0.7
"""Of the copy bandwidth, for decode at batch 128, context 2,048, 8 KV heads, head 128, bfloat16."""
LAYERS = 2
BLOCK_SIZE = 16
CALLS = 8
"""Calls of attention in one graph."""
LARGEST_ERROR = 1e-2
COPY_BYTES = 1 << 30
BACKENDS = ("triton", "flashinfer", "reference")

SWEEP_TILES = (16, 32, 64, 128)
SWEEP_WARPS = (2, 4, 8)
SWEEP_STAGES = (2, 3, 4)
SWEEP_SPLITS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Shape:
    batch: int
    context: int
    """Tokens of each request, the new ones included."""
    heads: int
    kv_heads: int
    head_dim: int
    dtype: Dtype
    window: int = 0
    new_tokens: int = 1

    @property
    def kv_bytes(self) -> int:
        """That one layer's decode has to read."""
        seen = min(self.context, self.window or self.context)
        row = 2 * self.kv_heads * self.head_dim * torch_dtype(self.dtype).itemsize
        return self.batch * seen * row

    @property
    def flop(self) -> int:
        """Of Q·K and P·V, as far as the mask lets them be seen; without a window."""
        first, last = self.context - self.new_tokens + 1, self.context
        pairs = (first + last) * self.new_tokens // 2
        return 4 * self.batch * self.heads * self.head_dim * pairs


class Bench:
    """One shape: a pool full of random K and V, a step, and its query, key and value."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self.shape = shape
        self.device = device
        self.dtype = torch_dtype(shape.dtype)
        self.geometry = BlockGeometry(
            LAYERS, BLOCK_SIZE, shape.kv_heads, shape.head_dim, shape.dtype
        )
        blocks_each = -(-shape.context // BLOCK_SIZE)
        generator = torch.Generator(device).manual_seed(0)
        num_blocks = shape.batch * blocks_each
        self.pool = torch.empty(
            (num_blocks, *self.geometry.block_shape), dtype=self.dtype, device=device
        )
        for block in self.pool.split(4096):  # a float32 copy of the whole would be twice its size
            block.copy_(torch.randn(block.shape, generator=generator, device=device))
        rows = shape.batch * shape.new_tokens

        def draw(heads: int) -> torch.Tensor:
            numbers = torch.randn(heads, rows, shape.head_dim, generator=generator, device=device)
            return numbers.to(self.dtype).transpose(0, 1)

        self.query = draw(shape.heads)
        self.key, self.value = draw(shape.kv_heads), draw(shape.kv_heads)
        tables = np.random.default_rng(0).permutation(num_blocks)
        self.plan = StepPlan(
            epoch=0,
            step=0,
            slot=0,
            wait_for_load=False,
            num_tokens=pack_i32([shape.new_tokens] * shape.batch),
            context_lens=pack_i32([shape.context - shape.new_tokens] * shape.batch),
            block_counts=pack_i32([blocks_each] * shape.batch),
            block_tables=pack_i32(tables.tolist()),
            token_ids=pack_i32([0] * rows),
            sample=(),
        )

    def open(self, name: Any) -> DevicePagedAttention:
        return open_attention(self.geometry, self.shape.heads, name, self.device)

    def over(self, backend: AttentionBackend) -> DevicePagedAttention:
        return DevicePagedAttention(self.geometry, self.dtype, self.shape.heads, backend)

    def prepare(self, attention: DevicePagedAttention) -> DeviceStep:
        attention.bind_pool(self.pool)
        step = attention.prepare(self.plan)
        attention.begin(step)
        return step

    def attend(self, attention: DevicePagedAttention, layer: int) -> torch.Tensor:
        scaling, window = self.shape.head_dim**-0.5, self.shape.window
        return attention.attend(layer, self.query, self.key, self.value, scaling, window, 0.0)

    def seconds(self, attention: DevicePagedAttention, rounds: int) -> float:
        """Of one call. Plain torch, a thousand times as long, gets two rounds."""
        self.prepare(attention)
        rounds = min(rounds, 2) if attention.backend.name == "reference" else rounds

        def calls() -> None:
            for call in range(CALLS):
                self.attend(attention, call % LAYERS)

        recorded = attention.backend.graphs and attention.backend.name != "flashinfer"
        return median_s(calls, self.device, rounds, graph=recorded) / CALLS

    def error(self, attention: DevicePagedAttention, expected: torch.Tensor) -> float:
        """‖out − expected‖ / ‖expected‖; infinite for what is not finite."""
        self.prepare(attention)
        out = self.attend(attention, 0).float()
        error = float((out - expected).norm() / expected.norm())
        return error if np.isfinite(error) else np.inf


def median_s(run: Callable[[], None], device: torch.device, rounds: int, *, graph: bool) -> float:
    """Seconds of `run` on the device, after two uncounted rounds; recorded once if `graph`."""
    if device.type == "cpu":
        run()
        return statistics.median(timed_on_cpu(run) for _ in range(rounds))
    for _ in range(2):
        run()
    torch.cuda.synchronize()
    if graph:
        recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recorded):
            run()
        run = recorded.replay
        run()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize()
    pairs = itertools.pairwise(marks)
    return statistics.median(begin.elapsed_time(end) for begin, end in pairs) / 1e3


def timed_on_cpu(run: Callable[[], None]) -> float:
    start_s = time.perf_counter()
    run()
    return time.perf_counter() - start_s


def copy_bytes_s(device: torch.device, size_bytes: int, rounds: int) -> float:
    """Bytes read and bytes written, per second, by copies within device memory."""
    source = torch.zeros(size_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size_bytes / median_s(lambda: target.copy_(source), device, rounds, graph=False)


def available(bench: Bench, name: str, found: FindingsWriter) -> DevicePagedAttention | None:
    """None, and a word about it, where this machine or this shape is nothing for the backend."""
    if name != "reference" and bench.device.type == "cpu":
        found.skip(f"{name} needs a GPU; the rehearsal has none")
        return None
    try:
        attention = bench.open(name)
    except ConfigError as reason:
        found.skip(str(reason))
        return None
    if attention.backend.name != name:
        found.skip(f"{name} cannot run this shape")
        return None
    return attention


def decode(
    bench: Bench, found: FindingsWriter, rounds: int, copied_bytes_s: float, target: float | None
) -> None:
    shape = bench.shape
    plain = bench.open("reference")
    bench.prepare(plain)
    expected = bench.attend(plain, 0).float()
    for name in BACKENDS:
        attention = available(bench, name, found)
        if attention is None:
            continue
        error = bench.error(attention, expected)
        if error > LARGEST_ERROR:
            found.fail(f"decode by {name}: off by {error:.3g}")
            continue
        seconds = bench.seconds(attention, rounds)
        read_bytes_s = shape.kv_bytes / seconds
        found.figure(
            f"decode by {name}", read_bytes_s / 1e9, "GB/s", note=f"{seconds * 1e6:.0f} us"
        )
        found.figure(
            f"decode by {name}: share of copy bandwidth",
            read_bytes_s / copied_bytes_s,
            at_least=target if name == "triton" else None,
            note=f"batch {shape.batch}, context {shape.context}, {shape.kv_heads} KV heads",
        )


def prefill(bench: Bench, found: FindingsWriter, rounds: int) -> None:
    shape = bench.shape
    for name in BACKENDS:
        attention = available(bench, name, found)
        if attention is None:
            continue
        seconds = bench.seconds(attention, rounds)
        found.figure(
            f"prefill by {name}",
            shape.flop / seconds / 1e12,
            "TFLOP/s",
            note=f"{shape.batch} x {shape.new_tokens} tokens of {shape.context}",
        )


def launches(head_dim: int) -> Iterator[tuple[Launch, int]]:
    for tile, warps, stages, splits in itertools.product(
        SWEEP_TILES, SWEEP_WARPS, SWEEP_STAGES, SWEEP_SPLITS
    ):
        if tile * head_dim <= 64 * 256:
            yield Launch(tile, warps, stages), splits


def sweep(bench: Bench, found: FindingsWriter, rounds: int, copied_bytes_s: float) -> None:
    """Every way to launch the decode kernel, fastest first."""
    from triton.runtime.errors import OutOfResources

    from pipemax.stage_worker.attention.device.triton_backend import TritonBackend

    results = []
    for launch, splits in launches(bench.shape.head_dim):
        attention = bench.over(TritonBackend(1, decode=launch, splits=splits))
        try:
            seconds = bench.seconds(attention, rounds)
        except OutOfResources:
            continue
        results.append((bench.shape.kv_bytes / seconds, launch, splits))
    for read_bytes_s, launch, splits in sorted(results, key=lambda result: -result[0]):
        found.figure(
            f"tile {launch.tile}, {launch.num_warps} warps, {launch.num_stages} stages, "
            f"{splits} splits",
            read_bytes_s / copied_bytes_s,
            note=f"of copy bandwidth; {read_bytes_s / 1e9:.0f} GB/s",
        )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--window", type=int, default=0, help="tokens; 0: none")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--sweep", action="store_true", help="tile, warps, stages and splits")
    parser.add_argument("--json", type=Path, metavar="FILE", help="figures and machine, as JSON")
    parser.add_argument("--findings", type=Path, metavar="FILE", help="for make gpu-check")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with small sizes")
    return parser.parse_args()


def machine(device: torch.device) -> dict[str, Any]:
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    if device.type == "cpu":
        return {**versions, "gpu": None}
    properties = torch.cuda.get_device_properties(device)
    return {
        **versions,
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
    }


@torch.inference_mode()
def main() -> int:
    asked = parse()
    device = torch.device("cpu" if asked.rehearse else "cuda")
    found = FindingsWriter(asked.findings)
    shape = Shape(
        asked.batch,
        asked.context,
        asked.heads,
        asked.kv_heads,
        asked.head_dim,
        asked.dtype,
        asked.window,
    )
    prompts = Shape(4, 2048, asked.heads, asked.kv_heads, asked.head_dim, asked.dtype, 0, 1024)
    rounds, copy_bytes = asked.rounds, COPY_BYTES
    if asked.rehearse:
        shape, prompts = Shape(2, 40, 4, 2, 64, "float32"), Shape(1, 24, 4, 2, 64, "float32", 0, 8)
        rounds, copy_bytes = 1, 1 << 20
    copied_bytes_s = copy_bytes_s(device, copy_bytes, rounds)
    found.figure("copy within device memory", copied_bytes_s / 1e9, "GB/s", note="read + written")
    bench = Bench(shape, device)
    if asked.sweep:
        sweep(bench, found, rounds, copied_bytes_s)
    else:
        decode(bench, found, rounds, copied_bytes_s, None if asked.rehearse else TARGET)
        del bench
        prefill(Bench(prompts, device), found, rounds)
    passed = found.finish()
    if asked.json is not None:
        figures = [figure.text() for figure in found.findings.figures]
        values = {figure.name: figure.value for figure in found.findings.figures}
        write_json(
            asked.json,
            {"machine": machine(device), "shape": vars(shape), "values": values, "lines": figures},
        )
    return 0 if passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
