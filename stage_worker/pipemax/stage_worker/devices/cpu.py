"""The CPU device: its memory is shared memory, its kernels are threads of this process."""

import math
from typing import cast

import numpy as np
import torch

from pipemax.proto.geometry import BlockGeometry
from pipemax.proto.memory import MemfdHandle, SharedMemory
from pipemax.stage_worker.channels.ring import RingShape, Rows
from pipemax.stage_worker.devices.base import Device, SharedTensor
from pipemax.stage_worker.dtypes import torch_dtype


class CpuDevice(Device):
    name = "cpu"

    def set_threads(self, count: int) -> None:
        torch.set_num_threads(count)

    def view_pool(
        self, memory: SharedMemory, geometry: BlockGeometry, num_blocks: int
    ) -> SharedTensor:
        return _view(memory, (num_blocks, *geometry.block_shape), torch_dtype(geometry.dtype))

    def allocate_ring(self, shape: RingShape) -> "CpuRing":
        return CpuRing(_create("pipemax-activations", shape.shape, torch_dtype(shape.dtype)))

    def open_ring(self, handle: MemfdHandle, shape: RingShape) -> "CpuRing":
        return CpuRing(_view(SharedMemory.open(handle), shape.shape, torch_dtype(shape.dtype)))

    def frame(self, rows: Rows) -> memoryview:
        return _bytes(cast(torch.Tensor, rows))

    def synchronize(self) -> None:
        """CPU kernels have finished when they return."""


class CpuRing:
    """Ring in shared memory. Its rows are tensors."""

    def __init__(self, shared: SharedTensor) -> None:
        self._shared = shared

    @property
    def handle(self) -> MemfdHandle:
        return self._shared.handle

    def write(self, slot: int, rows: Rows) -> None:
        self._shared.tensor[slot, : len(rows)].copy_(cast(torch.Tensor, rows))

    def read(self, slot: int, count: int) -> torch.Tensor:
        return self._shared.tensor[slot, :count]

    def frame(self, slot: int, count: int) -> memoryview:
        return _bytes(self.read(slot, count))

    def close(self) -> None:
        self._shared.close()


def _bytes(rows: torch.Tensor) -> memoryview:
    return rows.contiguous().view(torch.uint8).numpy().data.cast("B")


def _create(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> SharedTensor:
    memory = SharedMemory.create(name, math.prod(shape) * dtype.itemsize)
    memory.prefault()
    return _view(memory, shape, dtype)


def _view(memory: SharedMemory, shape: tuple[int, ...], dtype: torch.dtype) -> SharedTensor:
    """Through NumPy, whose array keeps the mapping alive; `torch.frombuffer` does not."""
    flat = torch.from_numpy(np.frombuffer(memory.buffer, np.uint8))
    return SharedTensor(flat[: math.prod(shape) * dtype.itemsize].view(dtype).view(shape), memory)
