"""Steps in which every request decodes one token, as CUDA graphs: one for each size of batch.

Kernels of a small batch take less time than calling for them does, and a graph is called for once.
A step runs the smallest graph that has room for it; rows too many are padding.

All graphs read one set of inputs at fixed addresses and write one output. A step's own inputs lie
in one of several versions, and a copy on the device, a few microseconds, brings them here. The
other way, a set of graphs for each version, would cost their memory and the time to record them
several times over.
"""

import bisect
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch

from pipemax.proto.cuda.runtime import Stream
from pipemax.stage_worker.attention.device.batch import DeviceBatch, DeviceStep, view_batch
from pipemax.stage_worker.attention.device.layout import BatchLayout, pack_step
from pipemax.stage_worker.attention.device.paged import DevicePagedAttention
from pipemax.stage_worker.devices.cuda.buffers import DeviceBuffer, Gpu
from pipemax.stage_worker.devices.cuda.inputs import InputVersion, StepInputs
from pipemax.stage_worker.devices.cuda.torch_side import Graph, Kernels
from pipemax.stage_worker.model.stage_model import StageModel
from pipemax.stage_worker.plan_columns import PlanColumns, read_columns
from pipemax.stage_worker.sweep import SweepShape, synthetic_plan

_SMALL_ROWS = (1, 2, 4, 8)
_ROWS_APART = 8


def bucket_rows(max_num_seqs: int) -> list[int]:
    """Sizes of batch that get a graph, smallest first: 1, 2, 4, 8, 16, 24, ... and the largest."""
    sizes = {*_SMALL_ROWS, *range(_ROWS_APART, max_num_seqs, _ROWS_APART)}
    return sorted({size for size in sizes if size < max_num_seqs} | {max_num_seqs})


@dataclass(frozen=True, slots=True)
class _Bucket:
    layout: BatchLayout
    batch: DeviceBatch
    graph: Graph


class DecodeGraphs:
    """The graphs of one stage, over inputs and output of their own."""

    def __init__(
        self,
        gpu: Gpu,
        model: StageModel,
        *,
        max_rows: int,
        table_blocks: int,
    ) -> None:
        """`table_blocks`: the most device blocks that the requests of a step have together."""
        self._runtime = gpu.runtime
        self._torch = gpu.torch
        self._model = model
        self._table_blocks = table_blocks
        self.max_rows = max_rows
        largest = BatchLayout.of_decodes(max_rows, table_blocks)
        self._inputs = DeviceBuffer(gpu, largest.num_bytes)
        width, dtype = model.hidden_size, model.dtype
        out_width, out_dtype = (
            (model.vocab_size, torch.float32) if model.is_last else (width, dtype)
        )
        self._out = DeviceBuffer(gpu, max_rows * out_width * out_dtype.itemsize)
        self.output = self._out.tensor((max_rows, out_width), out_dtype)
        """Of the graph that ran last: `[max_rows, hidden]`, or float32 logits
        `[max_rows, vocab]`."""
        self._hidden_buffer = DeviceBuffer(gpu, max_rows * width * dtype.itemsize)
        self._hidden = self._hidden_buffer.tensor((max_rows, width), dtype)
        self._buckets: dict[BatchLayout, _Bucket] = {}
        self._sizes: list[int] = []
        self._layouts: list[BatchLayout] = []
        """Of each size."""

    @property
    def attention(self) -> DevicePagedAttention:
        return cast(DevicePagedAttention, self._model.attention)

    def __len__(self) -> int:
        return len(self._buckets)

    def obstacle(self, compute: Stream) -> str | None:
        """Why steps cannot be recorded, in words; None: they can. Runs the largest."""
        backend = self.attention.backend
        if not backend.graphs:
            return f"the attention backend {backend.name} cannot be recorded"
        self._clear(compute)
        step = self._step(self.max_rows, compute)
        kernels = self._kernels(step)
        with self._torch.scope(compute):
            self.attention.plan(step)
            kernels()  # what compiles or loads, does so now, and may wait
        return self._torch.host_waits(compute, kernels)

    def capture(self, sizes: list[int], compute: Stream) -> None:
        """Records a graph of each size, the largest first: those after it find its memory. Raises
        NotCapturableError."""
        self._clear(compute)
        for rows in sorted(sizes, reverse=True):
            step = self._step(rows, compute)
            kernels = self._kernels(step)
            with self._torch.scope(compute):
                self.attention.plan(step)
                kernels()  # what compiles or loads, does so now
            self._runtime.synchronize(compute)
            graph = self._torch.capture(compute, kernels)
            layout = step.batch.layout
            self._buckets[layout] = _Bucket(layout, step.batch, graph)
        self._layouts = sorted(self._buckets, key=lambda layout: layout.rows)
        self._sizes = [layout.rows for layout in self._layouts]

    def forget(self) -> None:
        """All graphs; what they held is free once torch gives it back."""
        self._buckets.clear()
        self._layouts.clear()
        self._sizes.clear()

    def _clear(self, compute: Stream) -> None:
        """Rows of padding hold what steps before left: at first, zeros."""
        for buffer in (self._hidden_buffer, self._out):
            self._runtime.fill_zero(buffer.pointer, buffer.size_bytes, compute)

    def _step(self, rows: int, compute: Stream) -> DeviceStep:
        """A step of this size in the graphs' inputs: all its requests write to block 0, which holds
        nothing yet."""
        shape = SweepShape(items=rows, tokens=1, context_len=0)
        plan = synthetic_plan(shape, self._model.geometry.block_size, [0] * rows, [0] * rows)
        columns = read_columns(plan, self._model.geometry.block_size)
        layout = BatchLayout.of_decodes(rows, self._table_blocks)
        packed = np.empty(layout.num_bytes, np.uint8)
        num_bytes = pack_step(columns, layout, self.attention.tile_tokens, packed)
        with self._torch.scope(compute):
            self._inputs.bytes[:num_bytes].copy_(torch.from_numpy(packed)[:num_bytes])
        return DeviceStep(view_batch(self._inputs.bytes, layout), columns)

    def _kernels(self, step: DeviceStep) -> Kernels:
        """What is recorded."""
        rows = step.num_tokens
        hidden = None if self._model.is_first else self._hidden[:rows]
        out = self.output[:rows]

        def kernels() -> None:
            with torch.inference_mode():
                out.copy_(self._model.forward(step, hidden))

        return kernels

    # At work.

    def layout(self, columns: PlanColumns) -> BatchLayout | None:
        """Of the smallest graph with room for this step; None when there is none."""
        rows = columns.num_tokens.shape[0]
        if columns.token_ids.shape[0] != rows or columns.block_tables.shape[0] > self._table_blocks:
            return None
        at = bisect.bisect_left(self._sizes, rows)
        if at == len(self._sizes):
            return None
        return self._layouts[at]

    def batch(self, layout: BatchLayout) -> DeviceBatch | None:
        """The inputs of the graph of this layout; None when there is none."""
        bucket = self._buckets.get(layout)
        return None if bucket is None else bucket.batch

    def queue(
        self,
        inputs: StepInputs,
        version: InputVersion,
        hidden: torch.Tensor | None,
        compute: Stream,
    ) -> None:
        """Runs the graph whose inputs the step was packed for; see `output`."""
        bucket = self._buckets[inputs.step.batch.layout]
        self._runtime.copy(self._inputs.pointer, version.device.pointer, inputs.num_bytes, compute)

        def before() -> None:
            with torch.inference_mode():
                if hidden is not None:
                    self._hidden[: hidden.shape[0]].copy_(hidden)
                self.attention.plan(inputs.step)

        self._torch.launch(compute, before)
        self._torch.replay(compute, bucket.graph)

    def free(self) -> None:
        """The GPU has nothing queued."""
        self.forget()
        del self.output, self._hidden
        for buffer in (self._inputs, self._out, self._hidden_buffer):
            buffer.close()
