"""What this process's CUDA contexts take of the GPUs, as the driver's own tool counts it: free
memory before and after would count what the stages take meanwhile."""

import logging
import os
import subprocess
from collections.abc import Sequence

from pipemax.proto.sizes import format_size

QUERY = (
    "nvidia-smi",
    "--query-compute-apps=gpu_bus_id,pid,used_gpu_memory",
    "--format=csv,noheader,nounits",
)
TIMEOUT_S = 15.0

log = logging.getLogger(__name__)


def context_bytes(pci_bus_ids: Sequence[str], command: Sequence[str] = QUERY) -> tuple[int, ...]:
    """By entry of `pci_bus_ids`; empty where the tool is missing or does not see this process, as
    in some containers."""
    try:
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        log.info("the daemon's share of GPU memory is not known: %s", error)
        return ()
    used = parse(done.stdout, os.getpid())
    found = [used.get(_bus(pci_bus_id)) for pci_bus_id in pci_bus_ids]
    taken = tuple(size for size in found if size is not None)
    if len(taken) < len(found):
        log.info("the daemon's share of GPU memory is not known: %s does not say", command[0])
        return ()
    for pci_bus_id, size in dict(zip(pci_bus_ids, taken, strict=True)).items():
        log.info("the daemon's context takes %s of GPU %s", format_size(size), pci_bus_id)
    return taken


def parse(output: str, pid: int) -> dict[str, int]:
    """PCI bus id → bytes, from lines of `bus id, pid, MiB` about this process."""
    used = {}
    for line in output.splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) == 3 and fields[1] == str(pid) and fields[2].isdecimal():
            used[_bus(fields[0])] = int(fields[2]) * 2**20
    return used


def _bus(pci_bus_id: str) -> str:
    """Without how many digits the domain is written in."""
    return pci_bus_id.lower()[-12:]
