"""What processes may expect that use one GPU together; see `cuda_semantics.py`."""

import msgspec
import numpy as np
import pytest

from pipemax.proto.cuda.runtime import CudaRuntime
from pipemax.proto.errors import PipemaxSystemError
from support.cuda_world import (
    MIB,
    Child,
    CudaWorld,
    device_memory,
    eventually,
    host_memory,
    pattern,
    read_back,
    stream_of,
    write_through,
)


def lend_memory(runtime: CudaRuntime, parent: Child) -> None:
    """Child: lends memory with a pattern, then says what the borrower has made of it."""
    with device_memory(runtime, 3 * MIB) as device:
        write_through(runtime, device, pattern(3 * MIB, 6))
        parent.send(runtime.export_memory(device))
        assert parent.receive() == b"written"
        right = np.array_equal(read_back(runtime, device, 3 * MIB), pattern(3 * MIB, 7))
        parent.send(b"right" if right else b"wrong")
        assert parent.receive() == b"closed"


def check_memory_is_shared(world: CudaWorld) -> None:
    runtime = world.runtime
    with world.child(lend_memory) as child:
        mapped = runtime.open_memory(child.receive())
        assert np.array_equal(read_back(runtime, mapped, 3 * MIB), pattern(3 * MIB, 6))
        write_through(runtime, mapped, pattern(3 * MIB, 7))
        child.send(b"written")
        assert child.receive() == b"right"
        runtime.close_memory(mapped)
        child.send(b"closed")


RING_EVENTS, RING_SLOTS, STEPS, ROW_BYTES = 8, 2, 24, 512 * 1024


def send_rows(runtime: CudaRuntime, parent: Child) -> None:
    """Child: writes row after row to a ring of two slots, waits for events only. Where the parent
    has told that it queued a read, its event keeps the slot from being overwritten too early."""
    written = [runtime.create_event(interprocess=True) for _ in range(RING_EVENTS)]
    with (
        device_memory(runtime, RING_SLOTS * ROW_BYTES) as ring,
        host_memory(runtime, STEPS * ROW_BYTES) as host,
        stream_of(runtime) as stream,
    ):
        host.bytes[:] = pattern(STEPS * ROW_BYTES, 8)
        parent.send(runtime.export_memory(ring))
        for event in written:
            parent.send(runtime.export_event(event))
        read = [runtime.open_event(parent.receive()) for _ in range(RING_EVENTS)]
        for step in range(STEPS):
            if step >= RING_SLOTS:
                number = int(parent.receive())
                runtime.wait(stream, read[number % RING_EVENTS])
            slot = ring + step % RING_SLOTS * ROW_BYTES
            runtime.copy(slot, host.address + step * ROW_BYTES, ROW_BYTES, stream)
            runtime.record(written[step % RING_EVENTS], stream)
            parent.send(b"%d" % step)
        assert parent.receive() == b"closed"
    for event in [*written, *read]:
        runtime.destroy_event(event)
    parent.send(b"closed")


def check_streams_of_two_processes_wait_for_each_other(world: CudaWorld) -> None:
    """The way activations travel: no host waits for anything but messages."""
    runtime = world.runtime
    read = [runtime.create_event(interprocess=True) for _ in range(RING_EVENTS)]
    with world.child(send_rows) as child:
        ring = runtime.open_memory(child.receive())
        written = [runtime.open_event(child.receive()) for _ in range(RING_EVENTS)]
        for event in read:
            child.send(runtime.export_event(event))
        with (
            host_memory(runtime, STEPS * ROW_BYTES) as host,
            stream_of(runtime) as stream,
        ):
            for _ in range(STEPS):
                step = int(child.receive())
                runtime.wait(stream, written[step % RING_EVENTS])
                slot = ring + step % RING_SLOTS * ROW_BYTES
                runtime.copy(host.address + step * ROW_BYTES, slot, ROW_BYTES, stream)
                runtime.record(read[step % RING_EVENTS], stream)
                if step < STEPS - RING_SLOTS:
                    child.send(b"%d" % step)
            runtime.synchronize(stream)
            assert np.array_equal(host.bytes, pattern(STEPS * ROW_BYTES, 8))
        runtime.close_memory(ring)
        for event in written:
            runtime.destroy_event(event)
        child.send(b"closed")
        assert child.receive() == b"closed"
    for event in read:
        runtime.destroy_event(event)


def pin_the_same(runtime: CudaRuntime, parent: Child) -> None:
    """Child: pins a segment of the parent's and writes to it from its GPU."""
    with host_memory(runtime, MIB, opened=parent.receive()) as host:
        with device_memory(runtime, MIB) as device, stream_of(runtime) as stream:
            runtime.copy(device, host.address, MIB, stream)
            runtime.fill_zero(device, 1000, stream)
            runtime.copy(host.address, device, MIB, stream)
        parent.send(b"done")


def check_two_processes_pin_the_same_memory(world: CudaWorld) -> None:
    data = pattern(MIB, 9)
    with world.child(pin_the_same) as child, host_memory(world.runtime, MIB) as host:
        host.bytes[:] = data
        child.send(msgspec.msgpack.encode(host.memory.handle))
        assert child.receive() == b"done"
        data[:1000] = 0
        assert np.array_equal(host.bytes, data)


def lend_and_be_killed(runtime: CudaRuntime, parent: Child) -> None:
    """Child: holds memory and an event until it is killed."""
    device = runtime.allocate(48 * MIB)
    event = runtime.create_event(interprocess=True)
    parent.send(runtime.export_memory(device))
    parent.send(runtime.export_event(event))
    parent.receive()


def check_what_the_dead_held(world: CudaWorld) -> None:
    """Their memory comes back, and their handles open no more."""
    runtime = world.runtime
    before, _ = runtime.memory()
    with world.child(lend_and_be_killed) as child:
        handles = child.receive(), child.receive()
        assert runtime.memory()[0] <= before - 48 * MIB
        child.kill()
        with pytest.raises(PipemaxSystemError):
            runtime.open_memory(handles[0])
        with pytest.raises(PipemaxSystemError):
            runtime.open_event(handles[1])
    assert eventually(lambda: runtime.memory()[0] >= before)


def check_what_was_mapped_of_the_dead(world: CudaWorld) -> None:
    """A mapping of a dead process's memory can be closed, an event of its destroyed, and only then
    is the memory back."""
    runtime = world.runtime
    before, _ = runtime.memory()
    with world.child(lend_and_be_killed) as child:
        mapped = runtime.open_memory(child.receive())
        event = runtime.open_event(child.receive())
        child.kill()
    runtime.destroy_event(event)
    runtime.close_memory(mapped)
    assert eventually(lambda: runtime.memory()[0] >= before)
