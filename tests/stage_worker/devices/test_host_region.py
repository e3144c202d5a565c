"""A stage's part of the host pool: asked for, pinned in chunks, given up when its daemon dies."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import zmq

from pipemax.proto.cuda import pinned
from pipemax.proto.cuda.pinned import PinnedMemory
from pipemax.proto.errors import ConfigError, PipemaxSystemError
from pipemax.proto.memory import MemfdHandle, SharedMemory
from pipemax.proto.messages.kv import AskHostRegion, HostRegion, HostRegionHere
from pipemax.proto.messages.registry import KV
from pipemax.proto.rundir import create_run_dir, socket_endpoint
from pipemax.proto.sockets import bind_router, region_identity
from pipemax.proto.wire import Codec, encode
from pipemax.stage_worker.devices.cuda import host_region
from pipemax.stage_worker.devices.cuda.host_region import HostRegions, is_alive
from support.fake_cuda import FakeCuda, FakeCudaProcess, FakeMachine

PAGE = 4096
OFFSET, BLOCKS, BLOCK = 5000, 7, 3000
DAEMON = """
import msgspec, sys
from pipemax.proto.memory import SharedMemory
memory = SharedMemory.create("pool", int(sys.argv[1]))
sys.stdout.buffer.write(msgspec.json.encode(memory.handle) + b"\\n")
sys.stdout.flush()
sys.stdin.read()
"""


@pytest.fixture
def gpu(tmp_path: Path) -> Iterator[FakeCuda]:
    process = FakeCudaProcess(FakeMachine().at(tmp_path / "gpus"))
    yield process.open_runtime(0)
    process.close()


@pytest.fixture
def run_dir() -> Path:
    return create_run_dir("region")


@pytest.fixture
def pool() -> Iterator[SharedMemory]:
    memory = SharedMemory.create("pool", OFFSET + BLOCKS * BLOCK + 100)
    yield memory
    memory.close()


@pytest.fixture
def regions(gpu: FakeCuda, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HostRegions]:
    monkeypatch.setattr(host_region, "LOOK_INTERVAL_S", 0.02)
    monkeypatch.setattr(host_region, "ASK_INTERVAL_S", 0.05)
    regions = HostRegions(gpu, run_dir, 1, chunk_bytes=2 * PAGE)
    yield regions
    regions.close()


def region_of(handle: MemfdHandle) -> HostRegion:
    return HostRegion(handle=handle, offset_bytes=OFFSET, num_blocks=BLOCKS, block_bytes=BLOCK)


def until(condition: Callable[[], object]) -> None:
    give_up_s = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < give_up_s
        time.sleep(0.005)


def spans(gpu: FakeCuda) -> list[tuple[int, int]]:
    return sorted((s.start, s.size_bytes) for s in gpu.process.space.spans() if s.kind == "host")


def test_it_asks_until_it_is_answered_and_pins(
    gpu: FakeCuda, run_dir: Path, pool: SharedMemory, regions: HostRegions
) -> None:
    assert not regions.wait_answered(0.05)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    daemon = bind_router(context, socket_endpoint(run_dir, "kv"), KV)
    for _ in range(2):
        identity, question = daemon.recv_multipart()
        assert identity == region_identity(1)
        asked = Codec(KV, at_binder=True).decode(question)
        assert asked == AskHostRegion(stage=1, pci_bus_id="0000:0a:00.0")
        assert not regions.ready
    daemon.send_multipart([identity, encode(HostRegionHere(region=region_of(pool.handle)))])
    assert regions.wait_answered(20)
    until(lambda: regions.ready)
    found = spans(gpu)
    assert [size for _, size in found] == [2 * PAGE, 2 * PAGE, 2 * PAGE]
    assert found[0][0] % PAGE == 0
    daemon.close(linger=0)
    context.term()


def test_every_byte_of_the_region_is_reached_within_one_registration(
    gpu: FakeCuda, pool: SharedMemory, regions: HostRegions
) -> None:
    whole = np.frombuffer(pool.buffer, np.uint8)
    whole[:] = np.arange(len(whole)) % 251
    region = region_of(pool.handle)
    regions.offer(region)
    until(lambda: regions.ready)
    held = regions.hold(region)
    assert held is not None
    device, stream = gpu.allocate(BLOCKS * BLOCK), gpu.create_stream()
    at = device
    for address, size in held.pieces(0, BLOCKS * BLOCK):
        gpu.copy(at, address, size, stream)
        at += size  # type: ignore[assignment]
    gpu.synchronize(stream)
    view = gpu.array(device, BLOCKS * BLOCK)
    assert (view == whole[OFFSET : OFFSET + BLOCKS * BLOCK]).all()
    regions.release()
    assert next(iter(held.pieces(BLOCK, BLOCK)))[0] == held.begin + BLOCK
    del whole


def test_another_region_takes_its_place_once_no_copy_needs_it(
    gpu: FakeCuda, pool: SharedMemory, regions: HostRegions
) -> None:
    first = region_of(pool.handle)
    second = msgspec.structs.replace(first, offset_bytes=0)
    regions.offer(first)
    until(lambda: regions.ready)
    before = spans(gpu)
    assert regions.hold(second) is None
    assert regions.hold(first) is not None
    regions.offer(second)
    time.sleep(0.1)
    assert spans(gpu) == before
    assert not regions.ready
    regions.release()
    until(lambda: regions.ready)
    assert regions.hold(first) is None
    regions.offer(None)
    until(lambda: regions.ready)
    assert spans(gpu) == []


def test_the_memory_of_a_daemon_that_died_is_given_up(gpu: FakeCuda, regions: HostRegions) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", DAEMON, "100000"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as daemon:
        assert daemon.stdout is not None
        handle = msgspec.json.decode(daemon.stdout.readline(), type=MemfdHandle)
        regions.offer(region_of(handle))
        until(lambda: regions.ready)
        assert is_alive(handle)
        daemon.kill()
        daemon.wait()
        assert not is_alive(handle)
        until(lambda: not spans(gpu))
        assert not regions.ready
        assert "pool" not in Path("/proc/self/maps").read_text()


def test_what_cannot_be_pinned_is_an_error_with_its_remedy(
    pool: SharedMemory, regions: HostRegions, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: FakeCuda, address: int, size_bytes: int) -> None:
        raise PipemaxSystemError("GPU 0: pin 8 KiB: cudaErrorMemoryAllocation")

    monkeypatch.setattr(FakeCuda, "register_host", refuse)
    monkeypatch.setattr(pinned, "memlock_bytes", lambda: 65536)
    regions.offer(region_of(pool.handle))
    with pytest.raises(
        ConfigError, match=r"cannot pin .* RLIMIT_MEMLOCK is 64.0 KiB: raise it"
    ) as e:
        until(lambda: regions.ready)
    assert "`ulimit -l unlimited`" in str(e.value)
    assert "LimitMEMLOCK=infinity" in str(e.value)
    assert "--kv-offloading-size" in str(e.value)


def test_a_low_limit_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pinned, "memlock_bytes", lambda: 65536)
    pinned.warn_of_memlock(65536)
    assert not caplog.records
    pinned.warn_of_memlock(65537)
    assert "RLIMIT_MEMLOCK is 64.0 KiB" in caplog.text


def test_no_copy_is_long(
    gpu: FakeCuda, pool: SharedMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pinned, "COPY_BYTES", 3000)
    address = np.frombuffer(pool.buffer, np.uint8).ctypes.data
    pages = PinnedMemory(gpu, chunk_bytes=PAGE)
    pages.pin(address, address + 3 * PAGE, lambda: False)
    found = list(pages.pieces(address + 96, 2 * PAGE))
    assert found == [
        (address + 96, 3000),
        (address + 3096, 1000),
        (address + PAGE, 3000),
        (address + PAGE + 3000, 1096),
        (address + 2 * PAGE, 96),
    ]
    pages.unpin()


def test_a_stop_is_heard_between_chunks(gpu: FakeCuda, pool: SharedMemory) -> None:
    address = np.frombuffer(pool.buffer, np.uint8).ctypes.data
    pages = PinnedMemory(gpu, chunk_bytes=PAGE)
    heard = iter([False, False, True])
    pages.pin(address, address + 5 * PAGE, lambda: next(heard))
    assert spans(gpu) == [(address, PAGE), (address + PAGE, PAGE)]
    pages.unpin()
    pages.unpin()
    assert spans(gpu) == []
