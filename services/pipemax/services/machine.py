"""What this process may use of the machine: cores and memory, cgroup limits included."""

import os
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """Cores this process may run on: its affinity, and the cgroup's CPU quota if there is one."""
    cores = len(os.sched_getaffinity(0))
    quota = cpu_quota_cores()
    return cores if quota is None else max(1, min(cores, int(quota)))


def cpu_quota_cores() -> float | None:
    """The cgroup's CPU quota in cores, None when there is none."""
    fields = (_read(_CGROUP / "cpu.max") or "max").split()
    if len(fields) != 2 or not (fields[0].isdigit() and fields[1].isdigit()):
        return None
    return int(fields[0]) / int(fields[1])


def memory_bytes() -> int:
    """Memory this process may use in all: the machine's, or the cgroup's limit if lower."""
    limit = memory_limit_bytes()
    return _installed_bytes() if limit is None else limit


def memory_limit_bytes() -> int | None:
    """The cgroup's memory limit (version 2, else version 1), None when there is none or when it
    is more than the machine has, which is how version 1 says "none"."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        text = _read(_CGROUP / name)
        if text and text.isdigit():
            return int(text) if int(text) < _installed_bytes() else None
    return None


def available_memory_bytes() -> int:
    """What the kernel thinks can be taken without swapping (MemAvailable)."""
    for line in (_read(Path("/proc/meminfo")) or "").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _installed_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
