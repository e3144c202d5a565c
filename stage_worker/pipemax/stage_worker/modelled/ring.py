"""Activations of the modelled device: two numbers per token, in real shared memory."""

from typing import cast

import numpy as np

from pipemax.proto.memory import MemfdHandle, SharedMemory
from pipemax.stage_worker.channels.ring import RingShape, Rows
from pipemax.stage_worker.channels.shm import HostMemoryTransport
from pipemax.stage_worker.modelled.marks import U64Array

ROW_NUMBERS = 2
"""The context hash after the token, and when the row arrives: the modelled time at which its last
byte has crossed the link, in nanoseconds of the machine's monotonic clock."""


class ModelledRingMemory(HostMemoryTransport):
    """RingMemory whose rows are NumPy arrays of 64-bit numbers."""

    def allocate_ring(self, shape: RingShape) -> "ModelledRing":
        memory = SharedMemory.create("pipemax-activations", shape.size_bytes)
        memory.prefault()
        return ModelledRing(memory, shape)

    def open_ring(self, handle: MemfdHandle, shape: RingShape) -> "ModelledRing":
        return ModelledRing(SharedMemory.open(handle), shape)

    def frame(self, rows: Rows) -> memoryview:
        return np.ascontiguousarray(cast(U64Array, rows)).data.cast("B")


class ModelledRing:
    """`[num_slots, max_rows, ROW_NUMBERS]`"""

    def __init__(self, memory: SharedMemory, shape: RingShape) -> None:
        self._memory = memory
        self._slots = np.frombuffer(memory.buffer, np.uint64).reshape(shape.shape)

    @property
    def handle(self) -> MemfdHandle:
        return self._memory.handle

    def write(self, slot: int, rows: Rows) -> None:
        self._slots[slot, : len(rows)] = cast(U64Array, rows)

    def read(self, slot: int, count: int) -> U64Array:
        return self._slots[slot, :count]

    def frame(self, slot: int, count: int) -> memoryview:
        return self.read(slot, count).data.cast("B")

    def close(self) -> None:
        del self._slots
        self._memory.close()
