"""The one interface between a stage and the hardware it computes on."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from pipemax.proto.errors import ConfigError
from pipemax.proto.geometry import BlockGeometry
from pipemax.proto.memory import MemfdHandle, SharedMemory
from pipemax.proto.sizes import format_size


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


class Device(ABC):
    """Memory and execution of one stage."""

    name: str

    @abstractmethod
    def set_threads(self, count: int) -> None:
        """CPU threads that the kernels of this process may use."""

    @abstractmethod
    def allocate_pool(self, geometry: BlockGeometry, num_blocks: int) -> SharedTensor:
        """The device KV pool, `[num_blocks, layers, 2, block_size, kv_heads, head_dim]`, zeroed
        and resident."""

    @abstractmethod
    def allocate_ring(self, shape: tuple[int, int, int], dtype: torch.dtype) -> SharedTensor:
        """The sender's side of an activation ring, `[num_slots, max_rows, hidden]`."""

    @abstractmethod
    def open_ring(
        self, handle: MemfdHandle, shape: tuple[int, int, int], dtype: torch.dtype
    ) -> SharedTensor:
        """The receiver's side of a ring that a process of this machine allocated. Raises
        PipemaxSystemError when that process is gone."""

    @abstractmethod
    def synchronize(self) -> None:
        """Returns once everything computed so far lies in memory."""


def pool_blocks(geometry: BlockGeometry, budget_bytes: int, stage: int) -> int:
    """Blocks that `budget_bytes` of device memory hold; raises ConfigError when it is none."""
    num_blocks = budget_bytes // geometry.block_bytes
    if num_blocks == 0:
        raise ConfigError(
            f"--kv-cache-memory-bytes {format_size(budget_bytes)} holds no KV block: one block of "
            f"{geometry.block_size} tokens on stage {stage} takes {geometry.block_bytes} bytes "
            f"({format_size(geometry.block_bytes)}); give at least that, better a thousand times"
        )
    return num_blocks
