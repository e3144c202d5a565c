"""A step's kernels: called for one by one, or replayed from a graph."""

from collections.abc import Callable
from typing import cast

import torch

from pipemax.proto.cuda.runtime import Stream
from pipemax.stage_worker.attention.device.batch import DeviceBatch, view_batch
from pipemax.stage_worker.attention.device.layout import BatchLayout
from pipemax.stage_worker.attention.device.paged import DevicePagedAttention
from pipemax.stage_worker.devices.cuda.graphs import DecodeGraphs
from pipemax.stage_worker.devices.cuda.inputs import InputVersion, StepInputs
from pipemax.stage_worker.devices.cuda.torch_side import TorchSide
from pipemax.stage_worker.model.stage_model import StageModel
from pipemax.stage_worker.plan_columns import PlanColumns

Deliver = Callable[[torch.Tensor], None]
"""Takes `[T, hidden]`, or logits, where kernels may go on with them; called with them queued."""


class ForwardPass:
    """Queues the model's part of steps."""

    def __init__(
        self, torch_side: TorchSide, model: StageModel, graphs: DecodeGraphs | None
    ) -> None:
        self._torch = torch_side
        self._model = model
        self._graphs = graphs

    @property
    def attention(self) -> DevicePagedAttention:
        return cast(DevicePagedAttention, self._model.attention)

    def layout(self, columns: PlanColumns) -> BatchLayout:
        """How the step is to be packed."""
        graph = None if self._graphs is None else self._graphs.layout(columns)
        return graph or BatchLayout.of_step(columns, self.attention.tile_tokens)

    def batch(self, layout: BatchLayout, version: InputVersion) -> DeviceBatch:
        """What the kernels of a step of this layout, packed into `version`, will read: a graph's
        own inputs, which it is copied to, or those of the version."""
        graph = None if self._graphs is None else self._graphs.batch(layout)
        return graph or view_batch(version.device.bytes, layout)

    def queue(
        self,
        inputs: StepInputs,
        version: InputVersion,
        hidden: torch.Tensor | None,
        compute: Stream,
        deliver: Deliver,
    ) -> None:
        """Behind everything on `compute`, where `inputs` and `hidden` are valid by then."""
        graphs = self._graphs
        if graphs is not None and graphs.batch(inputs.step.batch.layout) is inputs.step.batch:
            graphs.queue(inputs, version, hidden, compute)
            self._torch.launch(compute, lambda: deliver(graphs.output))
            return

        def kernels() -> None:
            self.attention.plan(inputs.step)
            deliver(self._model.forward(inputs.step, hidden))

        self._torch.launch(compute, kernels)
