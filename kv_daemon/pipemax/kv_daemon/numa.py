"""Which CPUs share a memory node with a GPU."""

import logging
import os
from pathlib import Path

SYSFS = Path("/sys")

log = logging.getLogger(__name__)


def num_nodes(sysfs: Path = SYSFS) -> int:
    """Memory nodes of this machine; 1 where the kernel does not say."""
    return max(1, len(list((sysfs / "devices/system/node").glob("node[0-9]*"))))


def cpus_near(pci_bus_id: str, sysfs: Path = SYSFS) -> frozenset[int] | None:
    """CPUs of the memory node that the device is at; None where it is not known."""
    device = sysfs / "bus/pci/devices" / _sysfs_name(pci_bus_id)
    try:
        node = int((device / "numa_node").read_text())
        if node < 0:  # firmware that does not say
            return None
        cpus = (sysfs / f"devices/system/node/node{node}/cpulist").read_text()
    except (OSError, ValueError):
        return None
    return parse_cpu_list(cpus) or None  # a node of memory only


def parse_cpu_list(text: str) -> frozenset[int]:
    """The kernel's `0-3,8,10-11`. Raises ValueError for anything else."""
    cpus: set[int] = set()
    for part in text.strip().split(","):
        if part:
            first, _, last = part.partition("-")
            cpus.update(range(int(first), int(last or first) + 1))
    return frozenset(cpus)


def run_on(cpus: frozenset[int]) -> None:
    """Binds the calling thread to those of `cpus` that this process may use; what it touches first
    then lies on their node. Without any of them the thread stays where it is."""
    allowed = cpus & os.sched_getaffinity(0)
    if allowed:
        os.sched_setaffinity(0, allowed)
    else:
        log.warning("this process may use no CPU near the GPU: its host memory lies elsewhere")


def _sysfs_name(pci_bus_id: str) -> str:
    """CUDA's `00000000:65:00.0` or `0000:65:00.0`, in any case, as sysfs writes it."""
    domain, _, rest = pci_bus_id.strip().lower().partition(":")
    return f"{domain[-4:].rjust(4, '0')}:{rest}"
