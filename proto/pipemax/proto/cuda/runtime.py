"""The part of the CUDA runtime that PipeMax uses, for one GPU.

Device memory that other processes map, events that they wait for, and copies on streams: what
torch has no stable interface for. Pointers, streams and events are CUDA's own handles as integers,
so that torch (`ExternalStream`, DLPack) and cupy can work with the same ones.
"""

from dataclasses import dataclass
from typing import Any, NewType, Protocol

Pointer = NewType("Pointer", int)
"""Address of device memory, or of registered host memory."""
Stream = NewType("Stream", int)
CudaEvent = NewType("CudaEvent", int)

IPC_HANDLE_BYTES = 64
"""Of exported memory and of exported events alike."""


@dataclass(frozen=True, slots=True)
class GpuProperties:
    name: str
    pci_bus_id: str
    """`0000:65:00.0`; tells apart what ordinals of different processes mean."""
    total_bytes: int
    compute_capability: tuple[int, int]
    multiprocessors: int


class CudaRuntime(Protocol):
    """Calls for one GPU; each makes it the calling thread's current one first.

    Calls may come from any thread. What CUDA refuses raises PipemaxSystemError with CUDA's name for
    the error and the call; running out of device memory raises ConfigError with both sizes.
    """

    @property
    def gpu(self) -> int:
        """Ordinal, as this process sees GPUs."""

    def properties(self) -> GpuProperties: ...

    def memory(self) -> tuple[int, int]:
        """(free, total) bytes, of all processes together."""

    def can_access_peer(self, gpu: int) -> bool:
        """Whether this GPU reads memory of `gpu` directly; true for itself."""

    def make_current(self) -> None:
        """For libraries that use the calling thread's current GPU."""

    # Device memory, outside of any framework's allocator: a whole allocation is one IPC handle.

    def allocate(self, size_bytes: int) -> Pointer:
        """Not initialised."""

    def free(self, pointer: Pointer) -> None:
        """Waits for everything queued on the GPU. Nothing of this process may use the memory any
        more; a mapping of another process's keeps it from being given back."""

    def export_memory(self, pointer: Pointer) -> bytes:
        """IPC handle of an allocation, valid while this process keeps it."""

    def open_memory(self, handle: bytes) -> Pointer:
        """Maps another process's allocation. Raises PipemaxSystemError when its owner is gone, and
        in the process that made it (CUDA maps no allocation twice). Open each handle once."""

    def close_memory(self, pointer: Pointer) -> None:
        """Nothing queued here may use the mapping any more. The owner may be gone."""

    def array(self, pointer: Pointer, size_bytes: int) -> Any:
        """`[size_bytes]` uint8 over that memory, with `__dlpack__`; owns nothing."""

    # Host memory that the GPU copies from and to without the CPU.

    def register_host(self, address: int, size_bytes: int) -> None:
        """Pins pages of this process for every GPU. They must not be registered already."""

    def unregister_host(self, address: int) -> None:
        """Nothing queued may use it any more."""

    # Streams and events.

    def create_stream(self, *, urgent: bool = False) -> Stream:
        """Does not wait for the default stream. What is `urgent` goes first where there is a
        choice."""

    def destroy_stream(self, stream: Stream) -> None:
        """What is queued on it still runs."""

    def synchronize(self, stream: Stream) -> None:
        """Returns once everything queued so far has run; other threads run meanwhile."""

    def create_event(self, *, interprocess: bool = False, timed: bool = False) -> CudaEvent:
        """Not both: CUDA times no event that processes share."""

    def destroy_event(self, event: CudaEvent) -> None:
        """One that was exported: only when no other process will wait for it."""

    def export_event(self, event: CudaEvent) -> bytes: ...

    def open_event(self, handle: bytes) -> CudaEvent:
        """Raises PipemaxSystemError when its owner is gone. A stream that waits for a record which
        the owner did not live to pass waits for ever."""

    def record(self, event: CudaEvent, stream: Stream) -> None:
        """By the process that made the event."""

    def wait(self, stream: Stream, event: CudaEvent) -> None:
        """What is queued on `stream` from now on runs after the latest record of `event` before
        this call, in whatever process; after nothing when there was none."""

    def finished(self, event: CudaEvent) -> bool:
        """Whether the latest record has been passed; true before the first."""

    def synchronize_event(self, event: CudaEvent) -> None:
        """Blocks the calling thread, not the CPU and no other thread, until `finished`. For events
        of this process only: CUDA would wait for another's with a core kept busy."""

    def elapsed_s(self, begin: CudaEvent, end: CudaEvent) -> float:
        """Between the latest records of two timed events, both passed."""

    # Copies.

    def copy(self, target: int, source: int, size_bytes: int, stream: Stream) -> None:
        """Queues a copy between any two addresses: device, mapped or registered host memory."""

    def fill_zero(self, pointer: Pointer, size_bytes: int, stream: Stream) -> None: ...
