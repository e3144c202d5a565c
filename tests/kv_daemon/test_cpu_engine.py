"""The CPU's copy engine on real shared memory."""

import os
import select
import threading
from collections.abc import Iterator

import msgspec
import numpy as np
import pytest

from pipemax.kv_daemon.cpu_engine import CpuEngine
from pipemax.kv_daemon.events import Direction, Run, StartCopy
from pipemax.kv_daemon.host_pool import Blocks, HostPool, available_memory_bytes
from pipemax.proto.errors import ConfigError, InvariantError, PipemaxSystemError
from pipemax.proto.memory import MemfdHandle, SharedMemory
from pipemax.proto.messages.kv import AttachPool

BLOCK_BYTES = (96, 4096)
NUM_HOST = 16
NUM_DEVICE = 8


class Rig:
    """Two stages' pools, a host pool and an engine between them."""

    def __init__(self, bandwidth_bytes_s: float | None = None) -> None:
        self.engine = CpuEngine(2, bandwidth_bytes_s)
        self.pool = HostPool(NUM_HOST * sum(BLOCK_BYTES) + 5)
        self.host = self.pool.regions(NUM_HOST, BLOCK_BYTES)
        self.engine.lay_out(self.host)
        self.memories: list[SharedMemory] = []
        self.device = [self.attach(stage) for stage in (0, 1)]

    def attach(self, stage: int) -> Blocks:
        memory = SharedMemory.create("test-device", NUM_DEVICE * BLOCK_BYTES[stage])
        self.memories.append(memory)
        self.engine.map_pool(offer(stage, memory.handle))
        shape = (NUM_DEVICE, BLOCK_BYTES[stage])
        return np.frombuffer(memory.buffer, np.uint8).reshape(shape)

    def copy(self, stage: int, direction: Direction, *runs: Run) -> None:
        self.engine.start(StartCopy(stage, direction, runs))
        self.wait({(stage, direction)})

    def wait(self, expected: set[tuple[int, Direction]]) -> None:
        while expected:
            select.select([self.engine.fileno()], [], [])
            for ended in self.engine.completed():
                expected.remove(ended)

    def close(self) -> None:
        self.engine.close()
        del self.host
        del self.device
        self.pool.close()
        for memory in self.memories:
            memory.close()


def offer(stage: int, handle: MemfdHandle, num_blocks: int = NUM_DEVICE) -> AttachPool:
    return AttachPool(
        epoch=0, stage=stage, handle=handle, num_blocks=num_blocks, block_bytes=BLOCK_BYTES[stage]
    )


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.close()


def test_blocks_go_to_the_host_and_come_back(rig: Rig) -> None:
    generator = np.random.default_rng(1)
    for stage in (0, 1):
        pool = rig.device[stage]
        pool[:] = generator.integers(0, 256, pool.shape, np.uint8)
        before = pool.copy()
        rig.copy(stage, "store", Run(3, 0, 4), Run(12, 7, 1))
        assert (rig.host[stage][3:7] == before[0:4]).all()
        assert (rig.host[stage][12] == before[7]).all()
        untouched = [*range(3), *range(7, 12), *range(13, NUM_HOST)]
        assert not rig.host[stage][untouched].any()
        pool[:] = 0
        rig.copy(stage, "load", Run(12, 0, 1), Run(4, 2, 3))
        assert (pool[0] == before[7]).all()
        assert (pool[2:5] == before[1:4]).all()
        assert not pool[[1, 5, 6, 7]].any()


def test_totals_count_bytes_and_merged_copies(rig: Rig) -> None:
    rig.copy(1, "store", Run(0, 0, 5))
    rig.copy(1, "store", Run(5, 5, 1), Run(8, 6, 1))
    rig.copy(1, "load", Run(0, 0, 1))
    idle, used = rig.engine.totals()
    assert (used.store_bytes, used.store_copies) == (7 * 4096, 3)
    assert (used.load_bytes, used.load_copies) == (4096, 1)
    assert used.store_seconds > 0
    assert (idle.load_bytes, idle.store_seconds) == (0, 0.0)


def test_all_lanes_run_beside_each_other(rig: Rig) -> None:
    lanes: set[tuple[int, Direction]] = {(0, "load"), (0, "store"), (1, "load"), (1, "store")}
    for stage, direction in lanes:
        run = Run(0 if direction == "load" else 8, 0, 1)
        rig.engine.start(StartCopy(stage, direction, (run,)))
    rig.wait(lanes)


def test_an_imitated_link_takes_its_time_into_the_totals() -> None:
    rig = Rig(bandwidth_bytes_s=1e6)
    try:
        for _ in range(10):
            rig.copy(1, "load", Run(0, 0, 1))
        load = rig.engine.totals()[1]
        assert load.load_seconds >= 10 * 4096 / 1e6 * (1 - 1e-9)
    finally:
        rig.close()


def test_modelled_blocks_are_small_here_and_large_on_the_link() -> None:
    """What a stage really holds is copied; what the link carries takes time and is counted."""
    held, on_link, rate = 64, 10**9, 1e11
    engine = CpuEngine(2, rate, held_block_bytes=held)
    pool = HostPool(NUM_HOST * 2 * held)
    host = pool.regions(NUM_HOST, engine.held_bytes((on_link, 2 * on_link)))
    engine.lay_out(host)
    memory = SharedMemory.create("test-device", NUM_DEVICE * held)
    device = np.frombuffer(memory.buffer, np.uint8).reshape(NUM_DEVICE, held)
    given = offer(1, memory.handle)
    engine.map_pool(msgspec.structs.replace(given, block_bytes=2 * on_link))
    try:
        device[:] = np.arange(NUM_DEVICE)[:, None]
        engine.start(StartCopy(1, "store", (Run(3, 2, 4),)))
        select.select([engine.fileno()], [], [])
        assert engine.completed() == [(1, "store")]
        assert (host[1][3:7] == device[2:6]).all()
        totals = engine.totals()[1]
        assert totals.store_bytes == 4 * 2 * on_link
        assert totals.store_seconds >= 4 * 2 * on_link / rate * (1 - 1e-9)
        with pytest.raises(PipemaxSystemError, match="of 64 bytes in a segment of 512"):
            engine.map_pool(msgspec.structs.replace(given, num_blocks=NUM_DEVICE + 1))
    finally:
        engine.close()
        del host, device
        pool.close()
        memory.close()


def test_closing_does_not_wait_for_a_slow_link() -> None:
    """At one byte per second this test would run into its timeout."""
    rig = Rig(bandwidth_bytes_s=1.0)
    rig.engine.start(StartCopy(1, "load", (Run(0, 0, 8),)))
    rig.close()


def test_a_new_offer_takes_the_place_of_the_old(rig: Rig) -> None:
    old = rig.device[0]
    rig.host[0][0] = 7
    rig.device[0] = rig.attach(0)
    rig.copy(0, "load", Run(0, 1, 1))
    assert (rig.device[0][1] == 7).all()
    assert not old.any()


def test_a_copy_under_way_keeps_the_pool_it_began_with() -> None:
    """The stage dies and comes back while the imitated link is still busy with its old pool."""
    rig = Rig(bandwidth_bytes_s=4096 * 50)
    try:
        old = rig.device[1]
        rig.host[1][0] = 9
        rig.engine.start(StartCopy(1, "load", (Run(0, 3, 1),)))
        rig.memories.pop().close()
        rig.device[1] = rig.attach(1)
        rig.wait({(1, "load")})
        assert (old[3] == 9).all()
        assert not rig.device[1].any()
    finally:
        rig.close()


def test_a_pool_that_is_gone_or_too_small_is_refused(rig: Rig) -> None:
    memory = SharedMemory.create("gone", NUM_DEVICE * BLOCK_BYTES[0])
    handle = memory.handle
    with pytest.raises(PipemaxSystemError, match="9 blocks of 96 bytes"):
        rig.engine.map_pool(offer(0, handle, num_blocks=9))
    with pytest.raises(PipemaxSystemError, match="0 blocks"):
        rig.engine.map_pool(offer(0, handle, num_blocks=0))
    memory.close()
    with pytest.raises(PipemaxSystemError):
        rig.engine.map_pool(offer(0, handle))
    rig.copy(0, "load", Run(0, 0, 1))


def test_what_went_wrong_in_a_copy_is_raised(rig: Rig) -> None:
    rig.engine._host[0].flags.writeable = False
    rig.engine.start(StartCopy(0, "store", (Run(0, 0, 1),)))
    with pytest.raises(ValueError, match="read-only"):
        rig.wait({(0, "store")})


def test_blocks_that_do_not_exist_are_not_copied(rig: Rig) -> None:
    for run in (Run(NUM_HOST - 1, 0, 2), Run(0, NUM_DEVICE - 1, 2), Run(-1, 0, 1), Run(0, -1, 1)):
        with pytest.raises(InvariantError, match="do not exist"):
            rig.engine.start(StartCopy(0, "load", (run,)))


def test_nothing_is_left_open() -> None:
    def state() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    Rig().close()
    before = state()
    rig = Rig()
    rig.attach(0)
    rig.close()
    rig.engine.close()
    assert state() == before


def test_more_host_memory_than_there_is_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--kv-offloading-size .* is more than"):
        HostPool(available_memory_bytes() * 2)
