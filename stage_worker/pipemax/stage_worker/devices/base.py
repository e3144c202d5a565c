"""Hardware whose memory every process of the machine can map, and which has finished a step when
its kernels return. A GPU is different in both, and has an engine of its own: see `cuda/`."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from pipemax.proto.geometry import BlockGeometry
from pipemax.proto.memory import MemfdHandle, SharedMemory
from pipemax.stage_worker.channels.ring import Ring, RingShape, Rows
from pipemax.stage_worker.channels.shm import HostMemoryTransport


@dataclass(slots=True)
class SharedTensor:
    """A tensor in memory that other processes can map. Drop every view before `close`, or the
    mapping stays until they are gone."""

    tensor: torch.Tensor
    memory: SharedMemory

    @property
    def handle(self) -> MemfdHandle:
        """Opens the same memory in another process while this one lives."""
        return self.memory.handle

    def close(self) -> None:
        del self.tensor
        self.memory.close()


class Device(HostMemoryTransport, ABC):
    """Memory and execution of one stage."""

    name: str

    @abstractmethod
    def set_threads(self, count: int) -> None:
        """CPU threads that the kernels of this process may use."""

    @abstractmethod
    def view_pool(
        self, memory: SharedMemory, geometry: BlockGeometry, num_blocks: int
    ) -> SharedTensor:
        """The device KV pool in `memory`, which it owns from now on: `[num_blocks, layers, 2,
        block_size, kv_heads, head_dim]`."""

    @abstractmethod
    def allocate_ring(self, shape: RingShape) -> Ring:
        """See RingMemory, which a Device is, together with the next two."""

    @abstractmethod
    def open_ring(self, handle: MemfdHandle, shape: RingShape) -> Ring: ...

    @abstractmethod
    def frame(self, rows: Rows) -> memoryview: ...

    @abstractmethod
    def synchronize(self) -> None:
        """Returns once everything computed so far lies in memory."""
