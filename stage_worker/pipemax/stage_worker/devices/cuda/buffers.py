"""Memory that lies outside torch's allocator: at one address as long as the stage lives."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from pipemax.proto.cuda.runtime import CudaRuntime, Pointer
from pipemax.proto.memory import MemfdHandle, SharedMemory
from pipemax.stage_worker.devices.cuda.torch_side import TorchSide

_OWN_ALLOCATION_BYTES = 2 * 2**20
"""CUDA packs what is smaller into a common piece, and an IPC handle names the whole piece."""


class Gpu:
    """The GPU of one stage: both ways to it, and what lies on it outside torch's allocator."""

    def __init__(self, runtime: CudaRuntime, torch_side: TorchSide) -> None:
        self.runtime = runtime
        self.torch = torch_side
        self.buffer_bytes = 0
        """Of all DeviceBuffers."""


def whole_allocation_bytes(size_bytes: int) -> int:
    """What to allocate so that an IPC handle of the memory opens at its own beginning."""
    return -(-size_bytes // _OWN_ALLOCATION_BYTES) * _OWN_ALLOCATION_BYTES


class DeviceBuffer:
    """Device memory. Not initialised; may be exported. Drop every tensor of it before `close`."""

    def __init__(self, gpu: Gpu, size_bytes: int) -> None:
        self._gpu = gpu
        self.size_bytes = whole_allocation_bytes(size_bytes)
        self.pointer = gpu.runtime.allocate(self.size_bytes)
        gpu.buffer_bytes += self.size_bytes
        array = gpu.runtime.array(self.pointer, self.size_bytes)
        self.bytes: torch.Tensor = gpu.torch.view(array)
        """uint8 `[size_bytes]`"""

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype, offset: int = 0) -> torch.Tensor:
        """The memory from byte `offset` on as a tensor."""
        size_bytes = int(np.prod(shape)) * dtype.itemsize
        return self.bytes[offset : offset + size_bytes].view(dtype).view(shape)

    def close(self) -> None:
        """Nothing that uses it may be queued any more."""
        del self.bytes
        self._gpu.runtime.free(self.pointer)
        self._gpu.buffer_bytes -= self.size_bytes


class PinnedBuffer:
    """Host memory that the GPU copies from and to by itself: a segment of ours, or a peer's."""

    def __init__(self, runtime: CudaRuntime, memory: SharedMemory) -> None:
        """Takes over `memory`, whose pages become resident."""
        self._runtime = runtime
        self._memory = memory
        self.bytes: npt.NDArray[np.uint8] = np.frombuffer(memory.buffer, np.uint8)
        self.pointer = Pointer(int(self.bytes.ctypes.data))
        try:
            runtime.register_host(self.pointer, memory.size_bytes)
        except BaseException:
            del self.bytes
            memory.close()
            raise

    @classmethod
    def create(cls, runtime: CudaRuntime, name: str, size_bytes: int) -> "PinnedBuffer":
        return cls(runtime, SharedMemory.create(name, size_bytes))

    @property
    def handle(self) -> MemfdHandle:
        """Opens the same memory in another process while this one lives."""
        return self._memory.handle

    def close(self) -> None:
        """Nothing that uses it may be queued any more."""
        self._runtime.unregister_host(self.pointer)
        del self.bytes
        self._memory.close()


class Leftovers:
    """What the GPU may still use; closed once it has nothing queued."""

    def __init__(self) -> None:
        self._closers: list[Callable[[], None]] = []

    def add(self, close: Callable[[], None]) -> None:
        self._closers.append(close)

    def close(self) -> None:
        """The GPU has nothing queued."""
        closers, self._closers = self._closers, []
        for close in closers:
            close()
