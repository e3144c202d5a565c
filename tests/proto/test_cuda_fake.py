"""What the simulated CUDA refuses although CUDA may let it pass, and what its knobs do."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from pipemax.proto.cuda.runtime import Pointer
from pipemax.proto.errors import PipemaxSystemError
from support.cuda_world import Host, host_memory
from support.fake_cuda import FakeCuda, FakeCudaProcess, FakeMachine

SIZE = 8192
OpenProcess = Callable[..., FakeCudaProcess]


@pytest.fixture
def machine(tmp_path: Path) -> FakeMachine:
    return FakeMachine(num_gpus=3, gpu_bytes=2**20, peers=((0, 1),)).at(tmp_path / "gpus")


@pytest.fixture
def open_process(machine: FakeMachine) -> Iterator[OpenProcess]:
    """Each as if it were a process of its own."""
    processes: list[FakeCudaProcess] = []

    def make(visible: tuple[int, ...] | None = None) -> FakeCudaProcess:
        processes.append(FakeCudaProcess(machine, visible))
        return processes[-1]

    yield make
    for process in processes:
        process.die()


@pytest.fixture
def process(open_process: OpenProcess) -> FakeCudaProcess:
    return open_process()


@pytest.fixture
def gpu(process: FakeCudaProcess) -> FakeCuda:
    return process.open_runtime(0)


@pytest.fixture
def host(gpu: FakeCuda) -> Iterator[Host]:
    with host_memory(gpu, SIZE) as host:
        yield host


def test_copies_stay_in_bounds(gpu: FakeCuda, host: Host) -> None:
    device, stream = gpu.allocate(SIZE), gpu.create_stream()
    for target, source, size in (
        (device, host.address, SIZE + 1),
        (device + 1, host.address, SIZE),
        (host.address, device - 1, 2),
        (host.address + SIZE - 1, device, 2),
    ):
        with pytest.raises(PipemaxSystemError, match="neither in one allocation nor"):
            gpu.copy(target, source, size, stream)
    gpu.copy(device + 1, host.address, SIZE - 1, stream)
    gpu.synchronize(stream)


def test_copies_need_registered_memory(gpu: FakeCuda) -> None:
    device, stream = gpu.allocate(SIZE), gpu.create_stream()
    pageable = np.zeros(SIZE, np.uint8)
    with pytest.raises(PipemaxSystemError, match="registered"):
        gpu.copy(device, pageable.ctypes.data, SIZE, stream)
    with pytest.raises(PipemaxSystemError, match="registered"):
        gpu.copy(pageable.ctypes.data, device, SIZE, stream)


def test_registered_memory_begins_at_a_page(gpu: FakeCuda) -> None:
    with pytest.raises(PipemaxSystemError, match="page"):
        gpu.register_host(4097, SIZE)


def test_freed_memory_is_gone(gpu: FakeCuda, host: Host) -> None:
    device, stream = gpu.allocate(SIZE), gpu.create_stream()
    view = gpu.array(device, SIZE)
    assert (view == 0xFF).all()
    view[:] = 1
    gpu.free(device)
    assert (view == 0xFF).all()
    for call in (
        lambda: gpu.free(device),
        lambda: gpu.export_memory(device),
        lambda: gpu.array(device, SIZE),
        lambda: gpu.fill_zero(device, SIZE, stream),
        lambda: gpu.copy(host.address, device, SIZE, stream),
        lambda: gpu.close_memory(device),
    ):
        with pytest.raises(PipemaxSystemError):
            call()


def test_nothing_is_given_up_while_copies_need_it(
    process: FakeCudaProcess, gpu: FakeCuda, host: Host
) -> None:
    device, stream = gpu.allocate(SIZE), gpu.create_stream()
    gpu.call(stream, lambda: time.sleep(0.2))
    gpu.copy(device, host.address, SIZE, stream)
    with pytest.raises(PipemaxSystemError, match="queued"):
        gpu.free(device)
    with pytest.raises(PipemaxSystemError, match="queued"):
        gpu.unregister_host(host.address)
    gpu.synchronize(stream)
    gpu.free(device)


def test_nothing_is_destroyed_twice(gpu: FakeCuda) -> None:
    event, stream = gpu.create_event(), gpu.create_stream()
    gpu.destroy_event(event)
    gpu.destroy_stream(stream)
    for call in (
        lambda: gpu.destroy_event(event),
        lambda: gpu.destroy_stream(stream),
        lambda: gpu.synchronize(stream),
        lambda: gpu.finished(event),
    ):
        with pytest.raises(PipemaxSystemError, match="no longer"):
            call()


def test_what_is_queued_on_a_destroyed_stream_runs(gpu: FakeCuda) -> None:
    stream, event = gpu.create_stream(), gpu.create_event()
    gpu.call(stream, lambda: time.sleep(0.05))
    gpu.record(event, stream)
    gpu.destroy_stream(stream)
    gpu.synchronize_event(event)
    assert gpu.finished(event)


def test_a_wait_is_for_the_record_before_it(gpu: FakeCuda) -> None:
    """A later record, even one that never passes, does not hold up who waited for an earlier."""
    first, second, event = gpu.create_stream(), gpu.create_stream(), gpu.create_event()
    order: list[str] = []

    def late(pause_s: float, what: str) -> None:
        time.sleep(pause_s)
        order.append(what)

    gpu.call(first, lambda: late(0.05, "first"))
    gpu.record(event, first)
    gpu.wait(second, event)
    gpu.call(second, lambda: order.append("second"))
    gpu.call(first, lambda: late(0.3, "third"))
    gpu.record(event, first)
    gpu.synchronize(second)
    assert order == ["first", "second"]
    assert not gpu.finished(event)
    gpu.synchronize_event(event)
    assert order == ["first", "second", "third"]


def test_without_a_wait_streams_overtake_each_other(tmp_path: Path) -> None:
    """What the delays are for: a forgotten wait shows."""
    machine = FakeMachine(delay_s=0.002, seed=1).at(tmp_path / "late")
    process = FakeCudaProcess(machine)
    gpu = process.open_runtime(0)
    first, second = gpu.create_stream(), gpu.create_stream()
    order: list[int] = []
    for i in range(0, 60, 2):
        gpu.call(first, lambda i=i: order.append(i))  # type: ignore[misc]
        gpu.call(second, lambda i=i: order.append(i + 1))  # type: ignore[misc]
    gpu.synchronize(first)
    gpu.synchronize(second)
    process.close()
    assert sorted(order) == list(range(60)) != order


def test_memory_is_opened_once_and_by_others(open_process: OpenProcess) -> None:
    owner, other = open_process().open_runtime(0), open_process().open_runtime(0)
    handle = owner.export_memory(owner.allocate(SIZE))
    with pytest.raises(PipemaxSystemError, match="of this process"):
        owner.open_memory(handle)
    mapped = other.open_memory(handle)
    with pytest.raises(PipemaxSystemError, match="mapped already"):
        other.open_memory(handle)
    other.close_memory(mapped)
    with pytest.raises(PipemaxSystemError):
        other.close_memory(mapped)
    other.close_memory(other.open_memory(handle))


def test_only_peers_reach_each_others_memory(open_process: OpenProcess) -> None:
    owner, other = open_process(), open_process(visible=(2, 1))
    handle = owner.open_runtime(0).export_memory(owner.open_runtime(0).allocate(SIZE))
    stranger, peer = other.open_runtime(0), other.open_runtime(1)
    assert owner.open_runtime(0).can_access_peer(1)
    assert not owner.open_runtime(0).can_access_peer(2)
    assert owner.open_runtime(2).properties().pci_bus_id == stranger.properties().pci_bus_id
    with pytest.raises(PipemaxSystemError, match="PeerAccess"):
        stranger.open_memory(handle)
    peer.close_memory(peer.open_memory(handle))


def test_memory_is_counted_once_and_until_all_let_go(open_process: OpenProcess) -> None:
    owner, other = open_process(), open_process()
    handle = owner.open_runtime(0).export_memory(owner.open_runtime(0).allocate(SIZE))
    gpu = other.open_runtime(0)
    mapped = gpu.open_memory(handle)
    assert gpu.memory() == (2**20 - SIZE, 2**20)
    owner.die()
    assert gpu.memory() == (2**20 - SIZE, 2**20)
    gpu.close_memory(mapped)
    with pytest.raises(PipemaxSystemError, match="gone"):
        gpu.open_memory(handle)
    assert gpu.memory() == (2**20, 2**20)


def test_events_of_other_processes(open_process: OpenProcess) -> None:
    owner, other = open_process().open_runtime(0), open_process().open_runtime(0)
    event, stream = owner.create_event(interprocess=True), owner.create_stream()
    handle = owner.export_event(event)
    with pytest.raises(PipemaxSystemError, match="of this process"):
        owner.open_event(handle)
    with pytest.raises(PipemaxSystemError, match="interprocess"):
        owner.export_event(owner.create_event())
    opened, queue = other.open_event(handle), other.create_stream()
    with pytest.raises(PipemaxSystemError, match="that made it"):
        other.record(opened, queue)
    with pytest.raises(PipemaxSystemError, match="busy"):
        other.synchronize_event(opened)
    owner.call(stream, lambda: time.sleep(0.1))
    owner.record(event, stream)
    assert not other.finished(opened)
    with pytest.raises(PipemaxSystemError, match="pending"):
        owner.destroy_event(event)
    other.wait(queue, opened)
    other.synchronize(queue)
    assert owner.finished(event)
    assert other.finished(opened)
    owner.destroy_event(event)
    with pytest.raises(PipemaxSystemError, match="owner has destroyed it"):
        other.finished(opened)
    other.destroy_event(opened)


def test_an_event_is_pending_on_one_stream_only(gpu: FakeCuda) -> None:
    first, second, event = gpu.create_stream(), gpu.create_stream(), gpu.create_event()
    gpu.call(first, lambda: time.sleep(0.1))
    gpu.record(event, first)
    with pytest.raises(PipemaxSystemError, match="pending on another stream"):
        gpu.record(event, second)
    gpu.synchronize(first)
    gpu.record(event, second)
    gpu.synchronize(second)


def test_streams_belong_to_a_gpu(process: FakeCudaProcess, gpu: FakeCuda) -> None:
    other = process.open_runtime(1)
    with pytest.raises(PipemaxSystemError, match="another GPU"):
        other.record(other.create_event(), gpu.create_stream())
    with pytest.raises(PipemaxSystemError, match="two GPUs"):
        other.record(gpu.create_event(), other.create_stream())


def test_waiting_for_the_dead_lasts_until_the_process_dies(open_process: OpenProcess) -> None:
    """As with CUDA: nothing helps the stream, but the process can be ended."""
    owner, process = open_process(), open_process()
    there, here = owner.open_runtime(0), process.open_runtime(0)
    event, gate = there.create_event(interprocess=True), there.create_stream()
    there.call(gate, lambda: time.sleep(0.2))
    there.record(event, gate)
    stream, behind = here.create_stream(), here.create_event()
    here.wait(stream, here.open_event(there.export_event(event)))
    here.record(behind, stream)
    owner.die()
    time.sleep(0.3)
    assert not here.finished(behind)


def test_a_failed_kernel_breaks_the_gpu_for_its_process(
    process: FakeCudaProcess, gpu: FakeCuda
) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    stream, event = gpu.create_stream(), gpu.create_event()
    gpu.call(stream, fail)
    gpu.record(event, stream)
    with pytest.raises(PipemaxSystemError, match="ZeroDivisionError"):
        gpu.synchronize_event(event)
    with pytest.raises(PipemaxSystemError, match="ZeroDivisionError"):
        gpu.allocate(1)
    with pytest.raises(PipemaxSystemError, match="ZeroDivisionError"):
        process.close()


def test_calls_that_block_are_noted(process: FakeCudaProcess, gpu: FakeCuda) -> None:
    stream, event = gpu.create_stream(), gpu.create_event()
    device = gpu.allocate(SIZE)
    before = time.monotonic()
    gpu.record(event, stream)
    gpu.wait(stream, event)
    gpu.finished(event)
    gpu.fill_zero(Pointer(device), SIZE, stream)
    assert [call for call in process.blocking_calls if call.at_s > before] == []
    gpu.synchronize(stream)
    gpu.synchronize_event(event)
    noted = [call for call in process.blocking_calls if call.at_s > before]
    assert [call.call for call in noted] == ["synchronize", "synchronize_event"]
    assert {call.thread for call in noted} == {"MainThread"}
