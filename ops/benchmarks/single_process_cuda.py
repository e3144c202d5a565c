"""A plain loop in one process: the yardstick of `gpu_throughput.py`.

    python ops/benchmarks/single_process_cuda.py --model DIR --requests 128 --prompt 256 \
        --output 512 --json OUT [--backend auto] [--rehearse]

The model, the attention kernels and the block layout are PipeMax's own; there is no scheduler, no
socket, no second process and no pool to manage. All requests have equal lengths. Prompts are
computed in chunks, then every step decodes all requests: one CUDA graph of the model, argmax and
the copy of the tokens to where the next step reads them, so that the host never waits for the GPU.
The host prepares positions and block tables of a step while the one before it runs.

Random weights. Writes {"prefill_s", "decode_s", "steps"} of the best of the rounds, and all rounds.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipemax.proto.geometry import BlockGeometry, blocks_for
from pipemax.proto.messages.control import SampleRow, StepPlan
from pipemax.proto.messages.types import pack_i32
from pipemax.stage_worker.attention.device.batch import DeviceStep, view_batch
from pipemax.stage_worker.attention.device.layout import BatchLayout, pack_step
from pipemax.stage_worker.attention.device.paged import DevicePagedAttention
from pipemax.stage_worker.attention.device.select import open_attention
from pipemax.stage_worker.model.inspect import inspect_model
from pipemax.stage_worker.model.load import load_stage_model
from pipemax.stage_worker.model.stage_model import StageModel
from pipemax.stage_worker.plan_columns import read_columns

BLOCK_SIZE = 16
CHUNK_TOKENS = 2048
"""Prompt tokens of one step, at most; as the system's `--max-num-batched-tokens`."""
WARM_UP_STEPS = 3


@dataclass(frozen=True, slots=True)
class Work:
    requests: int
    prompt_tokens: int
    output_tokens: int

    @property
    def blocks_per_request(self) -> int:
        return blocks_for(self.prompt_tokens + self.output_tokens, BLOCK_SIZE)


def step_plan(
    work: Work, requests: range, new_tokens: int, context: int, token_ids: list[int]
) -> StepPlan:
    """`new_tokens` more of each of `requests`, which have `context` already. Each request's blocks
    follow each other."""
    count = blocks_for(context + new_tokens, BLOCK_SIZE)
    blocks = [
        request * work.blocks_per_request + index for request in requests for index in range(count)
    ]
    return StepPlan(
        epoch=0,
        step=0,
        slot=0,
        wait_for_load=False,
        num_tokens=pack_i32([new_tokens] * len(requests)),
        context_lens=pack_i32([context] * len(requests)),
        block_counts=pack_i32([count] * len(requests)),
        block_tables=pack_i32(blocks),
        token_ids=pack_i32(token_ids),
        sample=tuple(SampleRow(item, 0, 0, 0.0, 0, 1.0, 0.0) for item in range(len(requests))),
    )


class PlainLoop:
    """One model, one pool, one batch."""

    def __init__(self, model_dir: Path, backend: Any, device: torch.device, work: Work) -> None:
        self._work = work
        self._device = device
        self._model = load(model_dir, backend, device)
        geometry = self._model.geometry
        blocks = work.requests * work.blocks_per_request
        self._pool = torch.zeros(
            (blocks, *geometry.block_shape), dtype=self._model.dtype, device=device
        )
        self._model.bind_pool(self._pool)
        attention = self._model.attention
        assert isinstance(attention, DevicePagedAttention)
        self._attention = attention
        self._layout = BatchLayout.of_decodes(work.requests, blocks)
        self._buffer = torch.zeros(self._layout.num_bytes, dtype=torch.uint8, device=device)
        self._batch = view_batch(self._buffer, self._layout)
        self._host = [self._host_buffer() for _ in range(2)]
        self._sent: list[Callable[[], None]] = [lambda: None] * 2
        self._next = torch.zeros(work.requests, dtype=torch.int64, device=device)
        self._run = self._eager

    @torch.inference_mode()
    def prefill(self) -> None:
        """Leaves each request's first token in `_next`."""
        per_step = max(1, CHUNK_TOKENS // self._work.prompt_tokens)
        for first in range(0, self._work.requests, per_step):
            requests = range(first, min(self._work.requests, first + per_step))
            done = 0
            while done < self._work.prompt_tokens:
                count = min(CHUNK_TOKENS, self._work.prompt_tokens - done)
                ids = [3 + (7 * one + 11 * at) % 251 for one in requests for at in range(count)]
                step = self._attention.prepare(step_plan(self._work, requests, count, done, ids))
                logits = self._model.forward(step, None)
                done += count
            self._next[requests.start : requests.stop] = logits.argmax(-1)

    @torch.inference_mode()
    def decode(self, steps: int) -> None:
        """One token of every request for each step, without waiting for any."""
        self._batch.token_ids[0].copy_(self._next)
        for number in range(steps):
            self._send_inputs(number, self._work.prompt_tokens + number)
            self._run()

    @torch.inference_mode()
    def capture(self) -> None:
        """Records a step as a CUDA graph; from now on `decode` replays it. Where the attention
        cannot be recorded, steps stay what they are."""
        if not self._attention.backend.graphs:
            return
        self._send_inputs(0, self._work.prompt_tokens)
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_STEPS):
                self._eager()
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._eager()
        self._run = graph.replay

    def synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _eager(self) -> None:
        logits = self._model.forward(self._step, None)
        self._batch.token_ids[0].copy_(logits.argmax(-1))

    def _send_inputs(self, number: int, context: int) -> None:
        """All of the step's inputs but the tokens, which the step before leaves on the device."""
        work, side = self._work, number % 2
        self._sent[side]()
        plan = step_plan(work, range(work.requests), 1, context, [0] * work.requests)
        columns = read_columns(plan, BLOCK_SIZE)
        host = self._host[side]
        size = pack_step(columns, self._layout, self._attention.tile_tokens, host.numpy())
        begin = self._layout.position_ids.offset
        self._buffer[begin:size].copy_(host[begin:size], non_blocking=True)
        if self._device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
            self._sent[side] = event.synchronize
        self._step = DeviceStep(self._batch, columns)
        self._attention.plan(self._step)

    def _host_buffer(self) -> torch.Tensor:
        pinned = self._device.type == "cuda"
        return torch.zeros(self._layout.num_bytes, dtype=torch.uint8, pin_memory=pinned)


def load(model_dir: Path, backend: Any, device: torch.device) -> StageModel:
    """The whole model as one stage, with random weights."""
    layers = inspect_model(model_dir, "dummy").num_layers

    def attention(geometry: BlockGeometry, num_heads: int) -> DevicePagedAttention:
        return open_attention(geometry, num_heads, backend, device)

    return load_stage_model(
        model_dir,
        stage=0,
        layer_split=(layers,),
        dtype="auto",
        block_size=BLOCK_SIZE,
        device=device,
        open_attention=attention,
        load_format="dummy",
    )


def measure(loop: PlainLoop, work: Work) -> dict[str, float]:
    """Seconds of the whole work, from the prompts' first chunk to the last token."""
    loop.synchronize()
    started_s = time.perf_counter()
    loop.prefill()
    loop.synchronize()
    prefilled_s = time.perf_counter()
    loop.decode(work.output_tokens - 1)  # the prompts' last chunks gave the first tokens
    loop.synchronize()
    return {
        "prefill_s": prefilled_s - started_s,
        "decode_s": time.perf_counter() - prefilled_s,
        "steps": work.output_tokens - 1,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--requests", type=int, required=True)
    parser.add_argument("--prompt", type=int, required=True, help="tokens of each")
    parser.add_argument("--output", type=int, required=True, help="tokens of each")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, without a graph")
    options = parser.parse_args()
    work = Work(options.requests, options.prompt, options.output)
    device = torch.device("cpu" if options.rehearse else "cuda")
    loop = PlainLoop(options.model, options.backend, device, work)
    loop.prefill()
    if not options.rehearse:
        loop.capture()
    loop.decode(WARM_UP_STEPS)
    rounds = [measure(loop, work) for _ in range(options.rounds)]
    best = min(rounds, key=lambda one: one["prefill_s"] + one["decode_s"])
    options.json.write_text(json.dumps({**best, "rounds": rounds}, indent=2) + "\n")
    print(
        f"prefill {best['prefill_s']:.3f} s, {best['steps']:.0f} steps in {best['decode_s']:.3f} s"
    )


if __name__ == "__main__":
    main()
