"""The CPU device's memory."""

import pytest
import torch

from pipemax.proto.errors import ConfigError, PipemaxSystemError
from pipemax.proto.geometry import BlockGeometry
from pipemax.proto.memory import SharedMemory
from pipemax.stage_worker.devices.base import pool_blocks
from pipemax.stage_worker.devices.cpu import CpuDevice
from pipemax.stage_worker.devices.registry import open_device

GEOMETRY = BlockGeometry(num_layers=2, block_size=4, num_kv_heads=3, head_dim=8, dtype="bfloat16")


def test_a_pool_is_block_first_and_seen_by_who_maps_it() -> None:
    pool = CpuDevice().allocate_pool(GEOMETRY, 5)
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
    pool = CpuDevice().allocate_pool(GEOMETRY, 2)
    view = pool.tensor[1]
    pool.close()
    view.fill_(2.0)
    assert bool((view == 2.0).all())


def test_both_ends_of_a_ring_are_one_memory() -> None:
    device = CpuDevice()
    mine = device.allocate_ring((2, 3, 4), torch.float32)
    theirs = device.open_ring(mine.handle, (2, 3, 4), torch.float32)
    mine.tensor[1, 2] = torch.arange(4.0)
    assert torch.equal(theirs.tensor, mine.tensor)
    theirs.close()
    mine.close()


def test_a_ring_of_a_process_that_is_gone_is_an_error() -> None:
    device = CpuDevice()
    ring = device.allocate_ring((1, 1, 4), torch.float32)
    handle = ring.handle
    ring.close()
    with pytest.raises(PipemaxSystemError):
        device.open_ring(handle, (1, 1, 4), torch.float32)


def test_the_pool_takes_what_fits() -> None:
    assert pool_blocks(GEOMETRY, 10 * GEOMETRY.block_bytes, 0) == 10
    assert pool_blocks(GEOMETRY, 11 * GEOMETRY.block_bytes - 1, 0) == 10
    with pytest.raises(ConfigError, match=f"stage 2 takes {GEOMETRY.block_bytes} bytes"):
        pool_blocks(GEOMETRY, GEOMETRY.block_bytes - 1, 2)


def test_an_unknown_device_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="--device cuda is not implemented"):
        open_device("cuda")
