"""The only place that calls `torch.cuda`: kernels on our streams, graphs, torch's memory.

Streams, events and memory that other processes see come from CudaRuntime. torch only queues kernels
on those streams and owns weights and intermediate results. All of a stage's kernels go to one
stream, so that what torch's allocator frees and gives out again is used in stream order.
"""

import contextlib
import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch.utils.dlpack import from_dlpack

from pipemax.proto.cuda.runtime import CudaRuntime, Stream
from pipemax.proto.errors import ConfigError

Kernels = Callable[[], None]
"""Calls torch for kernels. It must not wait for the GPU, and must own what it reads: a simulated
GPU calls it when the stream gets there, on another thread."""


class NotCapturableError(Exception):
    """CUDA refuses to record this as a graph; says why."""


class Graph(Protocol):
    """Recorded kernels, over the addresses they were recorded with."""


class TorchSide(Protocol):
    @property
    def device(self) -> torch.device:
        """Where tensors of the GPU live."""

    def scope(self, stream: Stream) -> AbstractContextManager[None]:
        """For starting up: within it torch works on `stream`, with results at once where the host
        asks for them. Not for the work loop: see `launch`."""

    def launch(self, stream: Stream, kernels: Kernels) -> None:
        """Queues what `kernels` calls for behind everything on `stream`."""

    def capture(self, stream: Stream, kernels: Kernels) -> Graph:
        """Records what `kernels` calls for, and runs none of it. All graphs share one memory pool:
        they must run on one stream, and results of one are gone once another runs. Raises
        NotCapturableError."""

    def replay(self, stream: Stream, graph: Graph) -> None:
        """Queues the graph's kernels behind everything on `stream`."""

    def host_waits(self, stream: Stream, kernels: Kernels) -> str | None:
        """Runs `kernels`; returns what in it made the host wait for the GPU, None if nothing did.
        Such kernels can neither be captured nor queued ahead."""

    def view(self, array: Any) -> torch.Tensor:
        """`[size_bytes]` uint8 tensor over memory that CudaRuntime.array describes."""

    # torch's own memory on this GPU, bytes.

    def reserved_bytes(self) -> int:
        """Held by torch's allocator, in use or not."""

    def peak_bytes(self) -> int:
        """The most that was held at once since `reset_peak`."""

    def reset_peak(self) -> None: ...

    def release_unused(self) -> None:
        """Gives memory that no tensor uses back to CUDA. Waits for the GPU."""


class _RealTorch:
    """See TorchSide for what each call promises."""

    def __init__(self, runtime: CudaRuntime) -> None:
        if not torch.cuda.is_available():
            raise ConfigError(
                f"--device cuda needs a torch built for CUDA; torch {torch.__version__} finds no "
                "GPU it can use"
            )
        self.device = torch.device("cuda", runtime.gpu)
        torch.cuda.set_device(self.device)
        self._pool: Any = torch.cuda.graph_pool_handle()
        self._streams: dict[Stream, torch.cuda.ExternalStream] = {}

    def _stream(self, stream: Stream) -> torch.cuda.ExternalStream:
        if stream not in self._streams:
            external = torch.cuda.ExternalStream
            self._streams[stream] = external(stream, device=self.device)  # type: ignore[no-untyped-call]
        return self._streams[stream]

    def scope(self, stream: Stream) -> AbstractContextManager[None]:
        return torch.cuda.stream(self._stream(stream))

    def launch(self, stream: Stream, kernels: Kernels) -> None:
        with self.scope(stream):
            kernels()

    def capture(self, stream: Stream, kernels: Kernels) -> Graph:
        """Other threads go on calling CUDA meanwhile (they pin memory, wait for events), which the
        default mode would take for an error of ours."""
        graph = torch.cuda.CUDAGraph()
        recording = torch.cuda.graph(
            graph,
            pool=self._pool,
            stream=self._stream(stream),
            capture_error_mode="thread_local",
        )
        try:
            with _no_garbage_collection(), recording:
                kernels()
        except RuntimeError as error:
            first = error.__context__  # ending a recording that failed fails as well
            reason = first if isinstance(first, RuntimeError) else error
            raise NotCapturableError(_first_line(reason)) from error
        return graph

    def replay(self, stream: Stream, graph: Graph) -> None:
        assert isinstance(graph, torch.cuda.CUDAGraph)
        with self.scope(stream):
            graph.replay()

    def host_waits(self, stream: Stream, kernels: Kernels) -> str | None:
        with self.scope(stream), _sync_is_an_error():
            try:
                kernels()
            except RuntimeError as error:
                if "synchroniz" not in str(error):
                    raise
                return _first_line(error)
        return None

    def view(self, array: Any) -> torch.Tensor:
        """cupy makes torch's stream wait for its own, on which nothing ever runs."""
        return from_dlpack(array)

    def reserved_bytes(self) -> int:
        return torch.cuda.memory_reserved(self.device)

    def peak_bytes(self) -> int:
        return torch.cuda.max_memory_reserved(self.device)

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)

    def release_unused(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """GPU memory that it happened to free would end the recording."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextlib.contextmanager
def _sync_is_an_error() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls the mode a prototype each time it is set
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _first_line(error: RuntimeError) -> str:
    return str(error).strip().splitlines()[0]


def open_torch(runtime: CudaRuntime) -> TorchSide:
    """torch on the runtime's GPU, which becomes this thread's current one. Raises ConfigError when
    torch has no CUDA. Call it as `torch_side.open_torch`: tests put a simulated GPU there."""
    return _RealTorch(runtime)
