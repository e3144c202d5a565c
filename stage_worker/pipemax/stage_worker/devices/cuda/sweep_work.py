"""Synthetic steps of the warm-up sweep, timed by the GPU."""

import torch

from pipemax.proto.messages.control import StepPlan
from pipemax.stage_worker.channels.ring import RingShape, Rows
from pipemax.stage_worker.devices.cuda.buffers import DeviceBuffer, Gpu
from pipemax.stage_worker.devices.cuda.inlet import ArrivedRows
from pipemax.stage_worker.devices.cuda.step import CudaSteps, Prepared, StepStreams
from pipemax.stage_worker.dtypes import torch_dtype
from pipemax.stage_worker.executor import StepResult


class SweepWork:
    """StepWork of which every step runs alone. For starting up: it waits for the GPU."""

    def __init__(self, gpu: Gpu, steps: CudaSteps, streams: StepStreams, shape: RingShape) -> None:
        self._gpu = gpu
        self._steps = steps
        self._hidden_size = shape.hidden_size
        self._rows = DeviceBuffer(gpu, shape.max_rows * shape.row_bytes)
        size = (shape.max_rows, shape.hidden_size)
        with gpu.torch.scope(streams.compute), torch.inference_mode():
            self._rows.tensor(size, torch_dtype(shape.dtype)).normal_()
        gpu.runtime.synchronize(streams.compute)

    def rows(self, count: int) -> ArrivedRows:
        """Stands for so many rows of the previous stage."""
        return ArrivedRows((count, self._hidden_size), self._rows.pointer, None, -1)

    def prepare(self, plan: StepPlan) -> Prepared:
        prepared = self._steps.prepare(plan)
        assert prepared is not None, "no step is under way"
        return prepared

    def await_rows(self, rows: Rows) -> None:
        """The GPU waits for them."""

    def compute(self, plan: StepPlan, batch: Prepared, rows: Rows | None) -> StepResult:
        flight = self._steps.launch(batch, rows, -1)
        self._gpu.runtime.synchronize_event(flight.version.ended)
        spent = self._steps.spent(flight, None)
        sampled = self._steps.land(flight, wanted=True)
        return StepResult(tokens=sampled.tokens if sampled else [], compute_s=spent.compute_s)

    def close(self) -> None:
        self._rows.close()
