"""CudaRuntime by cupy, the one library that wraps all of these calls and needs no compiler.

cupy's calls release the interpreter's lock where CUDA may block. They use the calling thread's
current GPU, which a new thread has none of and another library may change: so every call sets it,
which costs well under a microsecond where it is the current one.
"""

from collections.abc import Callable
from typing import Any

from pipemax.proto.cuda.runtime import CudaEvent, GpuProperties, Pointer, Stream
from pipemax.proto.errors import ConfigError, PipemaxSystemError
from pipemax.proto.sizes import format_size

_INSTALL = "install pipemax[cuda12] or pipemax[cuda13], whichever matches torch.version.cuda"
_HIGH, _NORMAL = -1, 0
"""CUDA stream priorities: smaller is more urgent."""
_OUT_OF_MEMORY, _NOT_READY = 2, 600
"""cudaErrorMemoryAllocation and cudaErrorNotReady, which cupy does not name."""
_REGISTER_PORTABLE = 1
"""cudaHostRegisterPortable, which cupy does not name either: pinned for every GPU."""
_GRANULE_BYTES = 2 * 2**20
"""CUDA cuts smaller allocations out of blocks of this size; an IPC handle lends whole blocks."""


class CupyRuntime:
    """See CudaRuntime for what each call promises."""

    def __init__(self, gpu: int) -> None:
        try:
            import cupy
        except ImportError as error:
            raise ConfigError(f"--device cuda needs cupy ({error}); {_INSTALL}") from error
        self._cupy = cupy
        self._cuda = cupy.cuda.runtime
        self._refused: type[Exception] = self._cuda.CUDARuntimeError
        self.gpu = gpu
        try:
            there = self._cuda.getDeviceCount()
        except self._refused as error:
            raise ConfigError(f"--device cuda: no GPU can be used: {error}") from error
        if not 0 <= gpu < there:
            raise ConfigError(f"--gpus: there is no GPU {gpu}; this machine shows {there}")

    def _do(self, name: str, call: Callable[..., Any], *arguments: Any) -> Any:
        """Makes the GPU current, then calls; what CUDA refuses becomes a line that names the call.
        No context manager: a step makes many calls, and each would pay for it."""
        try:
            self._cuda.setDevice(self.gpu)
            return call(*arguments)
        except self._refused as error:
            raise self._failed(name, error) from error

    def _failed(self, name: str, error: Exception) -> PipemaxSystemError:
        return PipemaxSystemError(f"GPU {self.gpu}: {name}: {error}")

    def make_current(self) -> None:
        self._do("set device", lambda: None)

    def properties(self) -> GpuProperties:
        found = self._do("device properties", self._cuda.getDeviceProperties, self.gpu)
        bus_id = self._do("PCI bus id", self._cuda.deviceGetPCIBusId, self.gpu)
        return GpuProperties(
            name=found["name"].decode(),
            pci_bus_id=bus_id.lower(),
            total_bytes=int(found["totalGlobalMem"]),
            compute_capability=(int(found["major"]), int(found["minor"])),
            multiprocessors=int(found["multiProcessorCount"]),
        )

    def memory(self) -> tuple[int, int]:
        free, total = self._do("memory info", self._cuda.memGetInfo)
        return int(free), int(total)

    def can_access_peer(self, gpu: int) -> bool:
        if gpu == self.gpu:
            return True
        call = self._cuda.deviceCanAccessPeer
        return bool(self._do(f"peer access to GPU {gpu}", call, self.gpu, gpu))

    # Device memory.

    def allocate(self, size_bytes: int) -> Pointer:
        if size_bytes <= 0:
            raise ValueError(f"device memory of {size_bytes} bytes")
        self.make_current()
        granules = -(-size_bytes // _GRANULE_BYTES)
        try:
            return Pointer(self._cuda.malloc(granules * _GRANULE_BYTES))
        except self._refused as error:
            if getattr(error, "status", None) != _OUT_OF_MEMORY:
                raise self._failed("allocate", error) from error
            free, _ = self.memory()
            raise ConfigError(
                f"GPU {self.gpu} has {format_size(free)} free, not the {format_size(size_bytes)} "
                f"asked for ({error}); lower --gpu-memory-utilization or --kv-cache-memory-bytes"
            ) from error

    def free(self, pointer: Pointer) -> None:
        self._do("free", self._cuda.free, pointer)

    def export_memory(self, pointer: Pointer) -> bytes:
        return bytes(self._do("export memory", self._cuda.ipcGetMemHandle, pointer))

    def open_memory(self, handle: bytes) -> Pointer:
        """cupy's default flag lets a peer's memory in without further ado."""
        return Pointer(self._do("open another's memory", self._cuda.ipcOpenMemHandle, handle))

    def close_memory(self, pointer: Pointer) -> None:
        self._do("close another's memory", self._cuda.ipcCloseMemHandle, pointer)

    def array(self, pointer: Pointer, size_bytes: int) -> Any:
        self.make_current()
        cuda = self._cupy.cuda
        memory = cuda.UnownedMemory(pointer, size_bytes, None, self.gpu)
        return self._cupy.ndarray((size_bytes,), "uint8", cuda.MemoryPointer(memory, 0))

    # Host memory.

    def register_host(self, address: int, size_bytes: int) -> None:
        name = f"pin {format_size(size_bytes)} of host memory"
        self._do(name, self._cuda.hostRegister, address, size_bytes, _REGISTER_PORTABLE)

    def unregister_host(self, address: int) -> None:
        self._do("unpin host memory", self._cuda.hostUnregister, address)

    # Streams and events.

    def create_stream(self, *, urgent: bool = False) -> Stream:
        create = self._cuda.streamCreateWithPriority
        priority = _HIGH if urgent else _NORMAL
        return Stream(self._do("create stream", create, self._cuda.streamNonBlocking, priority))

    def destroy_stream(self, stream: Stream) -> None:
        self._do("destroy stream", self._cuda.streamDestroy, stream)

    def synchronize(self, stream: Stream) -> None:
        self._do("synchronize stream", self._cuda.streamSynchronize, stream)

    def create_event(self, *, interprocess: bool = False, timed: bool = False) -> CudaEvent:
        if interprocess and timed:
            raise ValueError("CUDA times no event that processes share")
        flags = self._cuda.eventBlockingSync
        if not timed:
            flags |= self._cuda.eventDisableTiming
        if interprocess:
            flags |= self._cuda.eventInterprocess
        return CudaEvent(self._do("create event", self._cuda.eventCreateWithFlags, flags))

    def destroy_event(self, event: CudaEvent) -> None:
        self._do("destroy event", self._cuda.eventDestroy, event)

    def export_event(self, event: CudaEvent) -> bytes:
        return bytes(self._do("export event", self._cuda.ipcGetEventHandle, event))

    def open_event(self, handle: bytes) -> CudaEvent:
        return CudaEvent(self._do("open another's event", self._cuda.ipcOpenEventHandle, handle))

    def record(self, event: CudaEvent, stream: Stream) -> None:
        self._do("record event", self._cuda.eventRecord, event, stream)

    def wait(self, stream: Stream, event: CudaEvent) -> None:
        self._do("wait for event", self._cuda.streamWaitEvent, stream, event)

    def finished(self, event: CudaEvent) -> bool:
        """cupy's query returns every status as a number and raises none. `check_status` raises it,
        and clears what CUDA keeps as the thread's last error: left there, cudaErrorNotReady would
        look like the failure of the next kernel to a library that shares this CUDA runtime."""
        status = self._do("query event", self._cuda.eventQuery, event)
        try:
            self._cuda.check_status(status)
        except self._refused as error:
            if status != _NOT_READY:
                raise self._failed("query event", error) from error
        return bool(status == 0)

    def synchronize_event(self, event: CudaEvent) -> None:
        self._do("synchronize event", self._cuda.eventSynchronize, event)

    def elapsed_s(self, begin: CudaEvent, end: CudaEvent) -> float:
        return float(self._do("elapsed time", self._cuda.eventElapsedTime, begin, end)) / 1e3

    # Copies.

    def copy(self, target: int, source: int, size_bytes: int, stream: Stream) -> None:
        kind = self._cuda.memcpyDefault
        self._do("copy", self._cuda.memcpyAsync, target, source, size_bytes, kind, stream)

    def fill_zero(self, pointer: Pointer, size_bytes: int, stream: Stream) -> None:
        self._do("fill with zeros", self._cuda.memsetAsync, pointer, 0, size_bytes, stream)
