"""The CPU device's memory."""

import pytest
import torch

from pipemax.proto.errors import ConfigError, PipemaxSystemError
from pipemax.proto.geometry import BlockGeometry
from pipemax.proto.memory import SharedMemory
from pipemax.stage_worker.channels.ring import RingShape
from pipemax.stage_worker.devices.base import SharedTensor
from pipemax.stage_worker.devices.cpu import CpuDevice
from pipemax.stage_worker.engine import pool_blocks

GEOMETRY = BlockGeometry(num_layers=2, block_size=4, num_kv_heads=3, head_dim=8, dtype="bfloat16")
RING = RingShape(num_slots=2, max_rows=3, hidden_size=4, dtype="float32")


def _pool(num_blocks: int) -> SharedTensor:
    memory = SharedMemory.create("pool", num_blocks * GEOMETRY.block_bytes)
    return CpuDevice().view_pool(memory, GEOMETRY, num_blocks)


def test_a_pool_is_block_first_and_seen_by_who_maps_it() -> None:
    pool = _pool(5)
    assert pool.tensor.shape == (5, 2, 2, 4, 3, 8)
    assert pool.tensor.dtype == torch.bfloat16
    assert pool.tensor.is_contiguous()
    assert not pool.tensor.any()
    pool.tensor[3] = 1.0
    memory = SharedMemory.open(pool.handle)
    one = torch.ones(1, dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes()
    start = 3 * GEOMETRY.block_bytes
    assert memory.buffer[start : start + GEOMETRY.block_bytes] == one * (
        GEOMETRY.block_bytes // len(one)
    )
    assert not any(memory.buffer[:start])
    memory.close()
    pool.close()


def test_a_view_outlives_the_close() -> None:
    pool = _pool(2)
    view = pool.tensor[1]
    pool.close()
    view.fill_(2.0)
    assert bool((view == 2.0).all())


def test_both_ends_of_a_ring_are_one_memory() -> None:
    device = CpuDevice()
    mine = device.allocate_ring(RING)
    theirs = device.open_ring(mine.handle, RING)
    rows = torch.arange(8.0).view(2, 4)
    mine.write(1, rows)
    assert torch.equal(theirs.read(1, 2), rows)
    assert not theirs.read(0, 3).any()
    assert theirs.frame(1, 2) == device.frame(rows)
    mine.frame(0, 1)[:4] = b"\0\0\x80\x3f"
    assert theirs.read(0, 1).tolist() == [[1.0, 0.0, 0.0, 0.0]]
    theirs.close()
    mine.close()


def test_a_ring_of_a_process_that_is_gone_is_an_error() -> None:
    device = CpuDevice()
    ring = device.allocate_ring(RING)
    handle = ring.handle
    ring.close()
    with pytest.raises(PipemaxSystemError):
        device.open_ring(handle, RING)


def test_the_pool_takes_what_fits() -> None:
    assert pool_blocks(96, 4, 960, 0) == 10
    assert pool_blocks(96, 4, 96 * 11 - 1, 0) == 10
    with pytest.raises(ConfigError, match="stage 2 takes 96 bytes"):
        pool_blocks(96, 4, 95, 2)
