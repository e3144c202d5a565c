"""What a process may expect of a GPU that it uses alone; see `cuda_semantics.py`."""

import ctypes
import threading

import numpy as np
import pytest

from pipemax.proto.cuda.runtime import Pointer
from pipemax.proto.errors import ConfigError, PipemaxSystemError
from pipemax.proto.memory import SharedMemory
from support.cuda_world import (
    MIB,
    CudaWorld,
    device_memory,
    eventually,
    host_memory,
    pattern,
    read_back,
    stream_of,
    write_through,
)


def check_the_gpu_is_described(world: CudaWorld) -> None:
    runtime = world.runtime
    properties = runtime.properties()
    free, total = runtime.memory()
    assert 0 <= free <= total
    assert properties.name
    assert properties.multiprocessors > 0
    assert properties.pci_bus_id == properties.pci_bus_id.lower()
    assert len(properties.pci_bus_id) == len("0000:65:00.0")
    assert runtime.can_access_peer(runtime.gpu)


def check_memory_is_counted_and_given_back(world: CudaWorld) -> None:
    runtime = world.runtime
    runtime.free(runtime.allocate(MIB))  # whatever the first allocation brings with it
    before, _ = runtime.memory()
    with device_memory(runtime, 32 * MIB):
        assert runtime.memory()[0] <= before - 32 * MIB
    assert eventually(lambda: runtime.memory()[0] >= before)


def check_too_much_memory_is_refused(world: CudaWorld) -> None:
    _, total = world.runtime.memory()
    with pytest.raises(ConfigError, match="lower --gpu-memory-utilization"):
        world.runtime.allocate(2 * total)
    with device_memory(world.runtime, MIB):
        pass  # and nothing is broken by it


def check_bytes_go_there_and_back(world: CudaWorld) -> None:
    """Odd sizes and odd addresses, between all kinds of memory."""
    runtime, data = world.runtime, pattern(100_003, 1)
    with (
        host_memory(runtime, 2 * data.size) as host,
        device_memory(runtime, 200_006) as device,
        stream_of(runtime) as stream,
    ):
        host.bytes[: data.size] = data
        runtime.copy(device, host.address, data.size, stream)
        runtime.copy(device + data.size, device, data.size, stream)
        runtime.copy(host.address + data.size, device + data.size, data.size, stream)
        runtime.synchronize(stream)
        assert np.array_equal(host.bytes[data.size :], data)


def check_zeros_fill_what_they_should(world: CudaWorld) -> None:
    runtime, data = world.runtime, pattern(4096, 2)
    with device_memory(runtime, data.size) as device, stream_of(runtime) as stream:
        write_through(runtime, device, data)
        runtime.fill_zero(Pointer(device + 1000), 2000, stream)
        runtime.synchronize(stream)
        data[1000:3000] = 0
        assert np.array_equal(read_back(runtime, device, data.size), data)


def check_torch_sees_the_same_memory(world: CudaWorld) -> None:
    import torch
    from torch.utils.dlpack import from_dlpack

    runtime, data = world.runtime, pattern(4096, 3)
    with device_memory(runtime, data.size) as device:
        write_through(runtime, device, data)
        tensor = from_dlpack(runtime.array(device, data.size))
        assert tensor.dtype == torch.uint8
        assert tensor.data_ptr() == device
        assert np.array_equal(tensor.cpu().numpy(), data)
        tensor[:7] = 5
        data[:7] = 5
        if tensor.is_cuda:
            torch.cuda.current_stream().synchronize()
        assert np.array_equal(read_back(runtime, device, data.size), data)
        part = from_dlpack(runtime.array(Pointer(device + 256), 512))
        assert part.data_ptr() == device + 256
        del tensor, part


def check_a_part_of_a_segment_can_be_pinned(world: CudaWorld) -> None:
    """From the beginning of a page on; copies begin anywhere in it."""
    runtime, data = world.runtime, pattern(10_000, 4)
    memory = SharedMemory.create("host", 64 * 1024)
    whole = np.frombuffer(memory.buffer, np.uint8)
    pinned, part = whole[4096:20_480], whole[5000:15_000]
    runtime.register_host(pinned.ctypes.data, pinned.size)
    try:
        with device_memory(runtime, data.size) as device, stream_of(runtime) as stream:
            part[:] = data
            runtime.copy(device, part.ctypes.data, data.size, stream)
            runtime.synchronize(stream)
            assert np.array_equal(read_back(runtime, device, data.size), data)
    finally:
        runtime.unregister_host(pinned.ctypes.data)
        del whole, pinned, part
        memory.close()


def check_pinning_twice_is_refused(world: CudaWorld) -> None:
    runtime = world.runtime
    with host_memory(runtime, 8 * 4096) as host:
        with pytest.raises(PipemaxSystemError):
            runtime.register_host(host.address, 8 * 4096)
        address = host.address
    with pytest.raises(PipemaxSystemError):
        runtime.unregister_host(address)


def check_a_stream_keeps_its_order(world: CudaWorld) -> None:
    """Each copy overwrites what the one before it reads."""
    runtime, size = world.runtime, 64 * 1024
    values = [pattern(size, seed) for seed in range(12)]
    with (
        host_memory(runtime, size * len(values)) as source,
        host_memory(runtime, size * len(values)) as target,
        device_memory(runtime, size) as device,
        stream_of(runtime, urgent=True) as stream,
    ):
        for i, value in enumerate(values):
            source.bytes[i * size : (i + 1) * size] = value
        for i in range(len(values)):
            runtime.copy(device, source.address + i * size, size, stream)
            runtime.copy(target.address + i * size, device, size, stream)
        runtime.synchronize(stream)
        assert np.array_equal(source.bytes, target.bytes)


def check_a_stream_waits_for_another(world: CudaWorld) -> None:
    """There and back through one buffer by two streams, in turns that only events keep."""
    runtime, size, turns = world.runtime, 256 * 1024, 16
    with (
        host_memory(runtime, size * turns) as source,
        host_memory(runtime, size * turns) as target,
        device_memory(runtime, size) as device,
        stream_of(runtime) as writer,
        stream_of(runtime) as reader,
    ):
        source.bytes[:] = pattern(size * turns, 5)
        written, read = runtime.create_event(), runtime.create_event()
        for i in range(turns):
            runtime.wait(writer, read)
            runtime.copy(device, source.address + i * size, size, writer)
            runtime.record(written, writer)
            runtime.wait(reader, written)
            runtime.copy(target.address + i * size, device, size, reader)
            runtime.record(read, reader)
        runtime.synchronize_event(read)
        assert runtime.finished(read)
        assert np.array_equal(source.bytes, target.bytes)
        runtime.destroy_event(written)
        runtime.destroy_event(read)


def check_an_event_never_recorded_holds_nobody_up(world: CudaWorld) -> None:
    runtime = world.runtime
    for interprocess in (False, True):
        event = runtime.create_event(interprocess=interprocess)
        assert runtime.finished(event)
        runtime.synchronize_event(event)
        with stream_of(runtime) as stream:
            runtime.wait(stream, event)
        runtime.destroy_event(event)


def check_an_event_passes_when_its_turn_comes(world: CudaWorld) -> None:
    runtime, size = world.runtime, 4 * MIB
    event = runtime.create_event()
    with (
        host_memory(runtime, size) as host,
        device_memory(runtime, size) as device,
        stream_of(runtime) as stream,
    ):
        runtime.fill_zero(device, size, stream)
        host.bytes[:] = 1
        for _ in range(8):
            runtime.copy(host.address, device, size, stream)
        runtime.record(event, stream)
        assert eventually(lambda: runtime.finished(event))
        assert not host.bytes.any()
    runtime.destroy_event(event)


def check_time_between_events(world: CudaWorld) -> None:
    runtime, size = world.runtime, 8 * MIB
    begin, middle, end = (runtime.create_event(timed=True) for _ in range(3))
    with (
        host_memory(runtime, size) as host,
        device_memory(runtime, size) as device,
        stream_of(runtime) as stream,
    ):
        runtime.record(begin, stream)
        runtime.copy(device, host.address, size, stream)
        runtime.record(middle, stream)
        runtime.copy(host.address, device, size, stream)
        runtime.record(end, stream)
        runtime.synchronize(stream)
        both = runtime.elapsed_s(begin, end)
        parts = runtime.elapsed_s(begin, middle) + runtime.elapsed_s(middle, end)
        assert 0 < both < 10
        assert both == pytest.approx(parts, abs=1e-4)
    for event in (begin, middle, end):
        runtime.destroy_event(event)


def check_time_of_untimed_events_is_refused(world: CudaWorld) -> None:
    runtime = world.runtime
    with pytest.raises(ValueError, match="times no event"):
        runtime.create_event(interprocess=True, timed=True)
    timed, plain = runtime.create_event(timed=True), runtime.create_event()
    with stream_of(runtime) as stream:
        runtime.record(plain, stream)
        runtime.record(timed, stream)
    for begin, end in ((plain, plain), (timed, plain)):
        with pytest.raises(PipemaxSystemError, match="elapsed time"):
            runtime.elapsed_s(begin, end)
    runtime.destroy_event(timed)
    runtime.destroy_event(plain)


def check_any_thread_may_call(world: CudaWorld) -> None:
    raised: list[BaseException] = []

    def work() -> None:
        try:
            check_bytes_go_there_and_back(world)
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not raised


def check_own_memory_is_not_mapped_twice(world: CudaWorld) -> None:
    runtime = world.runtime
    with device_memory(runtime, 2 * MIB) as device:
        handle = runtime.export_memory(device)
        assert len(handle) == 64
        with pytest.raises(PipemaxSystemError):
            runtime.open_memory(handle)


def check_nonsense_is_refused(world: CudaWorld) -> None:
    with pytest.raises(PipemaxSystemError):
        world.runtime.open_memory(bytes(64))
    with pytest.raises(PipemaxSystemError):
        world.runtime.open_event(bytes(64))
    with pytest.raises(PipemaxSystemError):
        world.runtime.free(Pointer(ctypes.addressof(ctypes.c_int())))
