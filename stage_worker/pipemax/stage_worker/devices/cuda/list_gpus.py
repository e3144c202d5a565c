"""What GPUs this machine shows: `python -m pipemax.stage_worker.devices.cuda.list_gpus`, JSON out.

A process of its own, because whoever looks at a GPU's memory gets a CUDA context, some hundred MiB
on each, and keeps it: the launcher lives as long as the system. Imports no torch.
"""

import sys
from pathlib import Path

import msgspec

from pipemax.proto import cuda
from pipemax.proto.cuda.runtime import CudaRuntime
from pipemax.proto.errors import ConfigError, PipemaxError, PipemaxSystemError

_SYSFS = Path("/sys/bus/pci/devices")


class GpuReport(msgspec.Struct, frozen=True, kw_only=True):
    ordinal: int
    name: str = ""
    pci_bus_id: str = ""
    total_bytes: int = 0
    free_bytes: int = 0
    """Less the context of the process that looked."""
    compute_capability: tuple[int, int] = (0, 0)
    peers: tuple[int, ...] = ()
    """Other GPUs whose memory this one reads directly."""
    numa_node: int | None = None
    """None: the machine has one node, or does not say."""
    error: str | None = None
    """Why it cannot be used; nothing else is known then."""


class GpuList(msgspec.Struct, frozen=True, kw_only=True):
    """`gpus` by ordinal; with an `error`, one line, there are none."""

    gpus: tuple[GpuReport, ...] = ()
    error: str | None = None


def list_gpus() -> GpuList:
    """Opens every GPU. Ordinals have no gaps: the first that is not there ends the list."""
    runtimes: list[CudaRuntime] = []
    try:
        while True:
            runtimes.append(cuda.open_runtime(len(runtimes)))
    except ConfigError as error:
        if not runtimes:
            return GpuList(error=_one_line(error))
    return GpuList(gpus=tuple(_report(runtime, len(runtimes)) for runtime in runtimes))


def _report(runtime: CudaRuntime, count: int) -> GpuReport:
    try:
        found = runtime.properties()
        free_bytes, _ = runtime.memory()
        others = (gpu for gpu in range(count) if gpu != runtime.gpu)
        return GpuReport(
            ordinal=runtime.gpu,
            name=found.name,
            pci_bus_id=found.pci_bus_id,
            total_bytes=found.total_bytes,
            free_bytes=free_bytes,
            compute_capability=found.compute_capability,
            peers=tuple(gpu for gpu in others if runtime.can_access_peer(gpu)),
            numa_node=numa_node(found.pci_bus_id),
        )
    except PipemaxSystemError as error:
        return GpuReport(ordinal=runtime.gpu, error=_one_line(error))


def _one_line(error: PipemaxError) -> str:
    return " ".join(str(error).split())


def numa_node(pci_bus_id: str, sysfs: Path = _SYSFS) -> int | None:
    """The memory node a PCI device is attached to; sysfs says -1 where there is only one."""
    try:
        node = int((sysfs / pci_bus_id / "numa_node").read_text())
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None


if __name__ == "__main__":
    sys.stdout.buffer.write(msgspec.json.encode(list_gpus()))
