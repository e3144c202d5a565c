"""What running processes have used of the machine, as Linux's /proc says it."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
_TICKS_S = os.sysconf("SC_CLK_TCK")
_SESSION, _USER_TICKS, _SYSTEM_TICKS = 3, 11, 12
"""Fields of `stat` after the command, which may hold anything; see proc(5)."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Of one process, bytes that are in memory now, and the most that ever were."""

    anonymous_bytes: int
    file_bytes: int
    """Code and data of libraries, mostly: shared with other processes that use them."""
    shared_bytes: int
    """Shared memory that it has touched: pools and activation rings."""
    peak_bytes: int

    @property
    def resident_bytes(self) -> int:
        return self.anonymous_bytes + self.file_bytes + self.shared_bytes

    @property
    def private_bytes(self) -> int:
        """Without shared memory."""
        return self.anonymous_bytes + self.file_bytes


def memory_of(pid: int) -> Memory:
    """Raises OSError when the process has ended."""
    found = {}
    for line in (_PROC / str(pid) / "status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in ("RssAnon", "RssFile", "RssShmem", "VmHWM"):
            found[name] = int(value.split()[0]) * 1024
    return Memory(found["RssAnon"], found["RssFile"], found["RssShmem"], found["VmHWM"])


def cpu_seconds(*sessions: int) -> float:
    """CPU time of all live processes of these sessions."""
    ticks = 0
    for fields in _all_stats():
        if int(fields[_SESSION]) in sessions:
            ticks += int(fields[_USER_TICKS]) + int(fields[_SYSTEM_TICKS])
    return ticks / _TICKS_S


def _all_stats() -> Iterator[list[str]]:
    for folder in _PROC.iterdir():
        if folder.name.isdigit():
            try:
                text = (folder / "stat").read_text()
            except OSError:  # has just ended
                continue
            yield text.rpartition(")")[2].split()
