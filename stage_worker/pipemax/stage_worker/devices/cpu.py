"""The CPU device: its memory is shared memory, its kernels are threads of this process."""

import math

import numpy as np
import torch

from pipemax.proto.geometry import BlockGeometry
from pipemax.proto.memory import MemfdHandle, SharedMemory
from pipemax.stage_worker.devices.base import Device, SharedTensor
from pipemax.stage_worker.dtypes import torch_dtype


class CpuDevice(Device):
    name = "cpu"

    def set_threads(self, count: int) -> None:
        torch.set_num_threads(count)

    def allocate_pool(self, geometry: BlockGeometry, num_blocks: int) -> SharedTensor:
        shape = (num_blocks, *geometry.block_shape)
        return _create("pipemax-kv-pool", shape, torch_dtype(geometry.dtype))

    def allocate_ring(self, shape: tuple[int, int, int], dtype: torch.dtype) -> SharedTensor:
        return _create("pipemax-activations", shape, dtype)

    def open_ring(
        self, handle: MemfdHandle, shape: tuple[int, int, int], dtype: torch.dtype
    ) -> SharedTensor:
        return _view(SharedMemory.open(handle), shape, dtype)

    def synchronize(self) -> None:
        """CPU kernels have finished when they return."""


def _create(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> SharedTensor:
    memory = SharedMemory.create(name, math.prod(shape) * dtype.itemsize)
    memory.prefault()
    return _view(memory, shape, dtype)


def _view(memory: SharedMemory, shape: tuple[int, ...], dtype: torch.dtype) -> SharedTensor:
    """Through NumPy, whose array keeps the mapping alive; `torch.frombuffer` does not."""
    flat = torch.from_numpy(np.frombuffer(memory.buffer, np.uint8))
    return SharedTensor(flat[: math.prod(shape) * dtype.itemsize].view(dtype).view(shape), memory)
