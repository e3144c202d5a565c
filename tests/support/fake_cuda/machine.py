"""The simulated GPUs of a machine, and how much of their memory living processes hold."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

_FILE = "machine.json"


@dataclass(frozen=True, slots=True)
class FakeMachine:
    """`directory` is where processes find it and note what they hold: see `at`."""

    directory: str = ""
    num_gpus: int = 1
    gpu_bytes: int = 256 * 2**20
    peers: tuple[tuple[int, int], ...] = ()
    """Pairs that read each other's memory."""
    delay_s: float = 0.0
    """Longest time by which a queued operation is late, so that what waits for no event shows."""
    delayed_share: float = 0.3
    """Of the operations."""
    seed: int = 0
    """Of the delays."""

    def at(self, directory: Path) -> "FakeMachine":
        """The same machine where processes that know the directory only can load it."""
        directory.mkdir(exist_ok=True)
        machine = dataclasses.replace(self, directory=str(directory))
        (directory / _FILE).write_bytes(msgspec.json.encode(machine))
        return machine

    @staticmethod
    def load(directory: Path) -> "FakeMachine":
        return msgspec.json.decode((directory / _FILE).read_bytes(), type=FakeMachine)

    def are_peers(self, gpu: int, other: int) -> bool:
        return gpu == other or (gpu, other) in self.peers or (other, gpu) in self.peers

    def held_bytes(self, gpu: int) -> int:
        """Device memory that some living process allocated or mapped, each allocation once."""
        held = {inode: size for holder, inode, size in self._holdings(gpu) if _is_alive(holder)}
        return sum(held.values())

    def hold(self, gpu: int, process: str, inode: int, size_bytes: int) -> Path:
        """Notes that this process holds an allocation, until the file is removed or it dies."""
        folder = Path(self.directory) / f"gpu{gpu}"
        folder.mkdir(exist_ok=True)
        pid = os.getpid()
        path = folder / f"{pid}.{_start_time(pid)}.{process}.{inode}"
        path.write_text(str(size_bytes))
        return path

    def _holdings(self, gpu: int) -> Iterator[tuple[tuple[int, int], int, int]]:
        """((pid, start time), inode, bytes)"""
        for path in (Path(self.directory) / f"gpu{gpu}").glob("*"):
            pid, start, _, inode = path.name.split(".")
            with contextlib.suppress(FileNotFoundError, ValueError):  # being removed, or written
                yield (int(pid), int(start)), int(inode), int(path.read_text())


def gpu_dir(run_dir: Path) -> Path:
    """Where the processes of a system find their machine."""
    return run_dir / "gpus"


def _is_alive(holder: tuple[int, int]) -> bool:
    pid, start = holder
    return _start_time(pid) == start


def _start_time(pid: int) -> int:
    """Tells a process from a later one of the same number; -1 when it is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return -1
    return -1 if fields[0] in "ZX" else int(fields[19])
