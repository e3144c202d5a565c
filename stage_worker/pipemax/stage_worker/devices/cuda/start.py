"""Starting up a stage on a GPU: how much memory its steps take, and its graphs."""

import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from pipemax.proto.config import EngineConfig
from pipemax.proto.cuda.runtime import Stream
from pipemax.proto.geometry import blocks_for
from pipemax.proto.sizes import format_size
from pipemax.stage_worker.devices.cuda.buffers import DeviceBuffer, Gpu
from pipemax.stage_worker.devices.cuda.graphs import DecodeGraphs, bucket_rows
from pipemax.stage_worker.devices.cuda.memory import (
    CONTEXT_BYTES,
    GRAPH_BYTES,
    MemoryUse,
    largest_step,
)
from pipemax.stage_worker.devices.cuda.torch_side import NotCapturableError
from pipemax.stage_worker.model.stage_model import StageModel

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StartUp:
    """One stage that has its weights and its buffers, but no KV pool yet."""

    gpu: Gpu
    config: EngineConfig
    model: StageModel
    compute: Stream

    @property
    def stages_here(self) -> int:
        assert self.config.cuda is not None
        return self.config.cuda.gpus.count(self.gpu.runtime.gpu)

    def measure(self, graphs: DecodeGraphs | None) -> MemoryUse:
        """Runs the largest step and records two graphs, over a pool just large enough for it."""
        assert self.config.cuda is not None
        gpu, buffer_bytes = self.gpu, self.gpu.buffer_bytes
        with self._small_pool():
            step_bytes = self._largest_step_bytes()
            graph_bytes = 0 if graphs is None else self._graph_bytes(graphs)
            gpu.torch.release_unused()
            free_bytes, total_bytes = gpu.runtime.memory()
            others_bytes = total_bytes - free_bytes - gpu.torch.reserved_bytes() - gpu.buffer_bytes
        return MemoryUse(
            total_bytes=total_bytes,
            utilization=self.config.cuda.gpu_memory_utilization,
            stages=self.stages_here,
            weights_bytes=self.model.weights_bytes,
            step_bytes=step_bytes,
            buffer_bytes=buffer_bytes,
            graph_bytes=graph_bytes,
            context_bytes=max(0, others_bytes) if self.stages_here == 1 else CONTEXT_BYTES,
        )

    @contextlib.contextmanager
    def _small_pool(self) -> Iterator[None]:
        most_tokens = min(self.config.max_model_len, self.config.max_num_batched_tokens)
        num_blocks = blocks_for(most_tokens, self.config.block_size)
        geometry = self.model.geometry
        pool = DeviceBuffer(self.gpu, num_blocks * geometry.block_bytes)
        self.gpu.runtime.fill_zero(pool.pointer, pool.size_bytes, self.compute)
        self.model.bind_pool(pool.tensor((num_blocks, *geometry.block_shape), self.model.dtype))
        try:
            yield
        finally:
            self.gpu.runtime.synchronize(self.compute)
            pool.close()

    def _largest_step_bytes(self) -> int:
        """What torch holds for it besides weights."""
        config, model, torch_side = self.config, self.model, self.gpu.torch
        plan = largest_step(
            config.max_num_batched_tokens,
            config.max_num_seqs,
            config.max_model_len,
            config.block_size,
        )
        torch_side.release_unused()
        torch_side.reset_peak()
        with torch_side.scope(self.compute), torch.inference_mode():
            step = model.attention.prepare(plan)
            hidden = None
            if not model.is_first:
                shape = (step.num_tokens, model.hidden_size)
                hidden = torch.zeros(shape, dtype=model.dtype, device=torch_side.device)
            out = model.forward(step, hidden)
            if model.is_last:
                out.argmax(dim=-1)
            del out, step, hidden
        self.gpu.runtime.synchronize(self.compute)
        return max(0, torch_side.peak_bytes() - model.weights_bytes)

    def _graph_bytes(self, graphs: DecodeGraphs) -> int:
        """Of all graphs, from what the two largest take: the first one's memory serves the others,
        each of which only adds what describes it."""
        sizes = bucket_rows(graphs.max_rows)
        self.gpu.torch.release_unused()  # as recording does: what it gives back is no graph's
        held = [self._held_bytes()]
        for rows in sizes[:-3:-1]:
            graphs.capture([rows], self.compute)
            self.gpu.torch.release_unused()
            held.append(self._held_bytes())
        graphs.forget()
        first_bytes = held[1] - held[0]
        each_bytes = held[2] - held[1] if len(held) > 2 else 0
        if self.stages_here > 1:
            each_bytes += GRAPH_BYTES
        return max(0, first_bytes) + max(0, each_bytes) * (len(sizes) - 1)

    def _held_bytes(self) -> int:
        """On a GPU of our own all that is not free; beside others, what torch has."""
        if self.stages_here > 1:
            return self.gpu.torch.reserved_bytes()
        free_bytes, total_bytes = self.gpu.runtime.memory()
        return total_bytes - free_bytes

    def usable(self, graphs: DecodeGraphs) -> bool:
        """Whether steps can be recorded: tried with the largest. A line in the log says why not."""
        with self._small_pool():
            obstacle = graphs.obstacle(self.compute)
            if obstacle is None:
                try:
                    graphs.capture([graphs.max_rows], self.compute)
                except NotCapturableError as error:
                    obstacle = str(error)
                graphs.forget()
        if obstacle is not None:
            log.warning("no CUDA graphs: %s", obstacle)
        return obstacle is None


def capture_all(graphs: DecodeGraphs, gpu: Gpu, compute: Stream) -> None:
    """Over the pool that the stage works with."""
    sizes = bucket_rows(graphs.max_rows)
    started_s, before_bytes = time.monotonic(), gpu.torch.reserved_bytes()
    graphs.capture(sizes, compute)
    log.info(
        "%d CUDA graphs for 1 to %d requests, %s, recorded in %.1f s",
        len(graphs),
        graphs.max_rows,
        format_size(max(0, gpu.torch.reserved_bytes() - before_bytes)),
        time.monotonic() - started_s,
    )
