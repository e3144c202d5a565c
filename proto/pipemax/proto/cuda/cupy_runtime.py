"""CudaRuntime by cupy, the one library that wraps all of these calls and needs no compiler."""

import contextlib
from collections.abc import Iterator
from typing import Any

from pipemax.proto.cuda.runtime import CudaEvent, GpuProperties, Pointer, Stream
from pipemax.proto.errors import ConfigError, PipemaxSystemError
from pipemax.proto.sizes import format_size

_INSTALL = "install pipemax[cuda12] or pipemax[cuda13], whichever matches torch.version.cuda"
_HIGH, _NORMAL = -1, 0
"""CUDA stream priorities: smaller is more urgent."""


class CupyRuntime:
    """See CudaRuntime for what each call promises."""

    def __init__(self, gpu: int) -> None:
        try:
            import cupy
        except ImportError as error:
            raise ConfigError(f"--device cuda needs cupy ({error}); {_INSTALL}") from error
        self._cupy = cupy
        self._cuda = cupy.cuda.runtime
        self.gpu = gpu
        try:
            there = self._cuda.getDeviceCount()
        except self._cuda.CUDARuntimeError as error:
            raise ConfigError(f"--device cuda: no GPU can be used: {error}") from error
        if not 0 <= gpu < there:
            raise ConfigError(f"--gpus: there is no GPU {gpu}; this machine shows {there}")

    @contextlib.contextmanager
    def _call(self, name: str) -> Iterator[None]:
        """Makes the GPU current; what CUDA refuses becomes a line that names the call."""
        try:
            self._cuda.setDevice(self.gpu)
            yield
        except self._cuda.CUDARuntimeError as error:
            raise PipemaxSystemError(f"GPU {self.gpu}: {name}: {error}") from error

    def make_current(self) -> None:
        with self._call("set device"):
            pass

    def properties(self) -> GpuProperties:
        with self._call("device properties"):
            found = self._cuda.getDeviceProperties(self.gpu)
            return GpuProperties(
                name=found["name"].decode(),
                pci_bus_id=self._cuda.deviceGetPCIBusId(self.gpu).lower(),
                total_bytes=int(found["totalGlobalMem"]),
                compute_capability=(int(found["major"]), int(found["minor"])),
                multiprocessors=int(found["multiProcessorCount"]),
            )

    def memory(self) -> tuple[int, int]:
        with self._call("memory info"):
            free, total = self._cuda.memGetInfo()
            return int(free), int(total)

    def can_access_peer(self, gpu: int) -> bool:
        if gpu == self.gpu:
            return True
        with self._call(f"peer access to GPU {gpu}"):
            return bool(self._cuda.deviceCanAccessPeer(self.gpu, gpu))

    # Device memory.

    def allocate(self, size_bytes: int) -> Pointer:
        self.make_current()
        try:
            return Pointer(self._cuda.malloc(size_bytes))
        except self._cuda.CUDARuntimeError as error:
            free, _ = self.memory()
            raise ConfigError(
                f"GPU {self.gpu} has {format_size(free)} free, not the {format_size(size_bytes)} "
                f"asked for ({error}); lower --gpu-memory-utilization or --kv-cache-memory-bytes"
            ) from error

    def free(self, pointer: Pointer) -> None:
        with self._call("free"):
            self._cuda.free(pointer)

    def export_memory(self, pointer: Pointer) -> bytes:
        with self._call("export memory"):
            return bytes(self._cuda.ipcGetMemHandle(pointer))

    def open_memory(self, handle: bytes) -> Pointer:
        with self._call("open another process's memory"):
            return Pointer(self._cuda.ipcOpenMemHandle(handle))

    def close_memory(self, pointer: Pointer) -> None:
        with self._call("close another process's memory"):
            self._cuda.ipcCloseMemHandle(pointer)

    def array(self, pointer: Pointer, size_bytes: int) -> Any:
        self.make_current()
        cuda = self._cupy.cuda
        memory = cuda.UnownedMemory(pointer, size_bytes, None, self.gpu)
        return self._cupy.ndarray((size_bytes,), "uint8", cuda.MemoryPointer(memory, 0))

    # Host memory.

    def register_host(self, address: int, size_bytes: int) -> None:
        portable = self._cuda.hostAllocPortable  # cudaHostRegister's flag has the same value, 1
        with self._call(f"pin {format_size(size_bytes)} of host memory"):
            self._cuda.hostRegister(address, size_bytes, portable)

    def unregister_host(self, address: int) -> None:
        with self._call("unpin host memory"):
            self._cuda.hostUnregister(address)

    # Streams and events.

    def create_stream(self, *, urgent: bool = False) -> Stream:
        with self._call("create stream"):
            flags = self._cuda.streamNonBlocking
            priority = _HIGH if urgent else _NORMAL
            return Stream(self._cuda.streamCreateWithPriority(flags, priority))

    def destroy_stream(self, stream: Stream) -> None:
        with self._call("destroy stream"):
            self._cuda.streamDestroy(stream)

    def synchronize(self, stream: Stream) -> None:
        with self._call("synchronize stream"):
            self._cuda.streamSynchronize(stream)

    def create_event(self, *, interprocess: bool = False, timed: bool = False) -> CudaEvent:
        if interprocess and timed:
            raise ValueError("CUDA times no event that processes share")
        flags = self._cuda.eventBlockingSync
        if not timed:
            flags |= self._cuda.eventDisableTiming
        if interprocess:
            flags |= self._cuda.eventInterprocess
        with self._call("create event"):
            return CudaEvent(self._cuda.eventCreateWithFlags(flags))

    def destroy_event(self, event: CudaEvent) -> None:
        with self._call("destroy event"):
            self._cuda.eventDestroy(event)

    def export_event(self, event: CudaEvent) -> bytes:
        with self._call("export event"):
            return bytes(self._cuda.ipcGetEventHandle(event))

    def open_event(self, handle: bytes) -> CudaEvent:
        with self._call("open another process's event"):
            return CudaEvent(self._cuda.ipcOpenEventHandle(handle))

    def record(self, event: CudaEvent, stream: Stream) -> None:
        with self._call("record event"):
            self._cuda.eventRecord(event, stream)

    def wait(self, stream: Stream, event: CudaEvent) -> None:
        with self._call("wait for event"):
            self._cuda.streamWaitEvent(stream, event)

    def finished(self, event: CudaEvent) -> bool:
        """cupy's query returns cudaErrorNotReady as a number and raises everything else."""
        with self._call("query event"):
            return bool(self._cuda.eventQuery(event) == 0)

    def synchronize_event(self, event: CudaEvent) -> None:
        with self._call("synchronize event"):
            self._cuda.eventSynchronize(event)

    def elapsed_s(self, begin: CudaEvent, end: CudaEvent) -> float:
        with self._call("elapsed time"):
            return float(self._cuda.eventElapsedTime(begin, end)) / 1e3

    # Copies.

    def copy(self, target: int, source: int, size_bytes: int, stream: Stream) -> None:
        with self._call("copy"):
            self._cuda.memcpyAsync(target, source, size_bytes, self._cuda.memcpyDefault, stream)

    def fill_zero(self, pointer: Pointer, size_bytes: int, stream: Stream) -> None:
        with self._call("fill with zeros"):
            self._cuda.memsetAsync(pointer, 0, size_bytes, stream)
