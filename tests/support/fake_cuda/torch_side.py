"""TorchSide on a simulated GPU: torch on the CPU, its kernels called by the stream's thread."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.dlpack import from_dlpack

from pipemax.proto.cuda.runtime import CudaRuntime, Stream
from pipemax.stage_worker.devices.cuda.torch_side import Graph, Kernels, TorchSide
from support.fake_cuda.runtime import FakeCuda

_WAITING = frozenset(
    f"aten.{name}"
    for name in (
        "_local_scalar_dense",
        "_unique2",
        "equal",
        "is_nonzero",
        "masked_select",
        "nonzero",
        "unique_dim",
    )
)
"""What needs a value, or a size, that only the GPU knows."""


RESERVED_BYTES, PEAK_BYTES = 4 * 2**20, 6 * 2**20


@dataclass(frozen=True, eq=False)
class FakeGraph:
    """CUDA would record kernels; this calls for them again."""

    kernels: Kernels


class FakeTorch:
    """See TorchSide for what each call promises."""

    device = torch.device("cpu")

    def __init__(self, runtime: FakeCuda) -> None:
        self._runtime = runtime

    @contextlib.contextmanager
    def scope(self, stream: Stream) -> Iterator[None]:
        """torch's kernels on the CPU run at once: in stream order, once the stream is empty."""
        self._runtime.synchronize(stream)
        yield

    def launch(self, stream: Stream, kernels: Kernels) -> None:
        self._runtime.call(stream, _in_modes_of_caller(kernels))

    def capture(self, stream: Stream, kernels: Kernels) -> Graph:
        self._runtime.call(stream, lambda: None)  # refuses a stream that is no more
        return FakeGraph(_in_modes_of_caller(kernels))

    def replay(self, stream: Stream, graph: Graph) -> None:
        assert isinstance(graph, FakeGraph)
        self._runtime.call(stream, graph.kernels)

    def host_waits(self, stream: Stream, kernels: Kernels) -> str | None:
        with self.scope(stream), _Waits() as waits:
            kernels()
        return waits.first

    def view(self, array: Any) -> torch.Tensor:
        return from_dlpack(array)

    def reserved_bytes(self) -> int:
        """Constants: what torch holds on the CPU says nothing of a GPU."""
        return RESERVED_BYTES

    def peak_bytes(self) -> int:
        return PEAK_BYTES

    def reset_peak(self) -> None:
        pass

    def release_unused(self) -> None:
        self._runtime.process.may_block("release_unused")


def _in_modes_of_caller(kernels: Kernels) -> Kernels:
    """torch's modes belong to threads: the stream's takes over the caller's."""
    inference = torch.is_inference_mode_enabled()
    grad = torch.is_grad_enabled()

    def run() -> None:
        with torch.inference_mode(inference), torch.set_grad_enabled(grad):
            kernels()

    return run


class _Waits(TorchDispatchMode):
    """Notes the first kernel that would make the host wait."""

    def __init__(self) -> None:
        super().__init__()
        self.first: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func.overloadpacket)
        waits = name in _WAITING or _indexes_by_mask(name, args) or _repeats_unknown(name, kwargs)
        if self.first is None and waits:
            self.first = f"{name} needs what only the GPU knows"
        return func(*args, **(kwargs or {}))


def _repeats_unknown(name: str, kwargs: Any) -> bool:
    """`repeat_interleave` asks for its result's size unless told."""
    return name == "aten.repeat_interleave" and (kwargs or {}).get("output_size") is None


def _indexes_by_mask(name: str, args: Any) -> bool:
    if name not in ("aten.index", "aten.index_put", "aten.index_put_", "aten._index_put_impl_"):
        return False
    return any(index is not None and index.dtype == torch.bool for index in args[1])


def open_torch(runtime: CudaRuntime) -> TorchSide:
    """Goes in the place of `torch_side.open_torch`."""
    assert isinstance(runtime, FakeCuda)
    return FakeTorch(runtime)
