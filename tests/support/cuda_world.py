"""A GPU and the processes around it, for checks of what CUDA does: see `cuda_semantics.py`."""

import importlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from pipemax.proto.cuda.runtime import CudaRuntime, Pointer, Stream
from pipemax.proto.memory import MemfdHandle, SharedMemory
from support.forkserver import CONTEXT

Bytes = npt.NDArray[np.uint8]
MIB = 2**20
DEADLINE_S = 60.0


@dataclass(frozen=True)
class CudaWorld:
    """runtime: of the calling process. opener: `module:function`, which given `argument` opens a
    runtime for the same GPU in a child."""

    runtime: CudaRuntime
    opener: str
    argument: str

    @contextmanager
    def child(self, script: "Script") -> Iterator["Child"]:
        """Runs `script`, a function of a module, in another process."""
        here, there = CONTEXT.Pipe()
        process = CONTEXT.Process(
            target=_run_child,
            args=(there, self.opener, self.argument, script.__module__, script.__name__),
        )
        process.start()
        there.close()
        child = Child(here, process.kill)
        try:
            yield child
        finally:
            if not child.killed:
                child.send(b"end")
            process.join(DEADLINE_S)
            process.kill()
            process.join()
            process.close()
            here.close()


def open_real(argument: str) -> CudaRuntime:
    """An opener for the real CUDA; `argument` is the GPU's ordinal."""
    from pipemax.proto.cuda.cupy_runtime import CupyRuntime

    return CupyRuntime(int(argument))


class Child:
    """The other process, as the test sees it, and the test, as the other process sees it."""

    def __init__(self, connection: "Connection[bytes, bytes]", kill: Callable[[], None]) -> None:
        self._connection = connection
        self._kill = kill
        self.killed = False

    def send(self, message: bytes) -> None:
        self._connection.send_bytes(message)

    def receive(self) -> bytes:
        if not self._connection.poll(DEADLINE_S):
            raise AssertionError("the other process says nothing")
        return self._connection.recv_bytes()

    def kill(self) -> None:
        """kill -9; returns once it is dead."""
        self.killed = True
        self._kill()
        with pytest.raises((EOFError, ConnectionResetError)):
            self.receive()


Script = Callable[[CudaRuntime, Child], None]


def _run_child(
    connection: "Connection[bytes, bytes]", opener: str, argument: str, module: str, script: str
) -> None:
    """Until the script returns; then until told to end."""
    where, function = opener.split(":")
    runtime: CudaRuntime = getattr(importlib.import_module(where), function)(argument)
    parent = Child(connection, lambda: None)
    getattr(importlib.import_module(module), script)(runtime, parent)
    while parent.receive() != b"end":
        pass


class Host:
    """Registered host memory."""

    def __init__(self, runtime: CudaRuntime, size_bytes: int, opened: bytes = b"") -> None:
        self._runtime = runtime
        self.memory = (
            SharedMemory.open(msgspec.msgpack.decode(opened, type=MemfdHandle))
            if opened
            else SharedMemory.create("host", size_bytes)
        )
        self.bytes: Bytes = np.frombuffer(self.memory.buffer, np.uint8)
        self.address = self.bytes.ctypes.data
        runtime.register_host(self.address, size_bytes)

    def close(self) -> None:
        self._runtime.unregister_host(self.address)
        del self.bytes
        self.memory.close()


@contextmanager
def host_memory(runtime: CudaRuntime, size_bytes: int, opened: bytes = b"") -> Iterator[Host]:
    host = Host(runtime, size_bytes, opened)
    try:
        yield host
    finally:
        host.close()


@contextmanager
def device_memory(runtime: CudaRuntime, size_bytes: int) -> Iterator[Pointer]:
    pointer = runtime.allocate(size_bytes)
    yield pointer
    runtime.free(pointer)


@contextmanager
def stream_of(runtime: CudaRuntime, *, urgent: bool = False) -> Iterator[Stream]:
    """Drained at the end."""
    stream = runtime.create_stream(urgent=urgent)
    yield stream
    runtime.synchronize(stream)
    runtime.destroy_stream(stream)


def pattern(size_bytes: int, seed: int) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, size_bytes, np.uint8)


def read_back(runtime: CudaRuntime, pointer: int, size_bytes: int) -> Bytes:
    """What lies there once everything queued elsewhere is over."""
    with host_memory(runtime, size_bytes) as host, stream_of(runtime) as stream:
        runtime.copy(host.address, pointer, size_bytes, stream)
        runtime.synchronize(stream)
        return host.bytes.copy()


def write_through(runtime: CudaRuntime, pointer: int, data: Bytes) -> None:
    with host_memory(runtime, data.size) as host, stream_of(runtime) as stream:
        host.bytes[:] = data
        runtime.copy(pointer, host.address, data.size, stream)
        runtime.synchronize(stream)


def eventually(condition: Callable[[], bool]) -> bool:
    deadline_s = time.monotonic() + DEADLINE_S
    while not (met := condition()) and time.monotonic() < deadline_s:
        time.sleep(0.02)
    return met
