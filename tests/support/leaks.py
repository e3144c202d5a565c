"""What a test may not leave behind: processes, threads, file descriptors, shared memory, locks.

`snapshot()` before and after; `leaks(before, after)` says in words what is new. Things that a
library opens once and keeps (a random source, multiprocessing's own helpers) do not count.
"""

import gc
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker
from pathlib import Path

import psutil

from pipemax.proto.rundir import launcher_pid

RUNTIME_DIR_VARIABLE = "PIPEMAX_RUNTIME_DIR"
_MULTIPROCESSING_HELPERS = ("multiprocessing.forkserver", "multiprocessing.resource_tracker")
_KEPT_OPEN = re.compile(r"/dev/(null|u?random|nvidia.*)|/proc/.*|/sys/.*")
"""Targets that libraries open on first use and keep."""
_MEMFD = re.compile(r"(/memfd:\S+)")
_SHM = "/dev/shm"
_OPENMP = "__KMP_REGISTERED_LIB_"
"""LLVM's OpenMP marks with it that it was loaded; of a process that is killed the mark stays."""
_theirs: set[str] = set()
"""Of its files: once somebody else's, always."""
_LIBFFI_MEMFD = "/memfd:libffi"
"""Where ctypes' callbacks live."""


@dataclass(frozen=True)
class Snapshot:
    """What this process holds at one moment."""

    processes: frozenset[tuple[int, str]]
    """(pid, command line) of all descendants, and of processes of this test's runtime directory
    that lost their parent."""
    threads: frozenset[tuple[int, str]]
    """(ident, name) of threads that would keep the process from ending."""
    fds: frozenset[tuple[int, str]]
    """(descriptor, what it refers to)"""
    mappings: frozenset[str]
    """Address ranges of mapped memfds."""
    shm_files: frozenset[str]
    """/dev/shm, but for what other processes than ours have mapped"""
    locks: frozenset[str]
    """Run directories below `$PIPEMAX_RUNTIME_DIR` whose lock is held."""


def snapshot(*, fresh: bool = False) -> Snapshot:
    """fresh: the runtime directory was just made, so that no process can have been started with
    it."""
    return Snapshot(
        processes=frozenset(_processes(fresh)),
        threads=frozenset(
            (thread.ident or 0, thread.name)
            for thread in threading.enumerate()
            if not thread.daemon and thread is not threading.main_thread()
        ),
        fds=frozenset(_fds()),
        mappings=frozenset(_memfd_mappings()),
        shm_files=frozenset(our_shm_files()),
        locks=frozenset(_held_locks()),
    )


def leaks(before: Snapshot, after: Snapshot) -> list[str]:
    """One line for each thing that `after` holds and `before` did not."""
    found = [f"process {pid}: {name}" for pid, name in sorted(after.processes - before.processes)]
    found += [f"thread {name}" for _, name in sorted(after.threads - before.threads)]
    found += [f"file descriptor {fd}: {target}" for fd, target in sorted(after.fds - before.fds)]
    found += [f"mapped memory {mapping}" for mapping in sorted(after.mappings - before.mappings)]
    found += [f"/dev/shm/{name}" for name in sorted(after.shm_files - before.shm_files)]
    found += [f"locked run directory {path}" for path in sorted(after.locks - before.locks)]
    return found


def settled_leaks(before: Snapshot, settle_s: float = 20.0) -> list[str]:
    """Leaks since `before` that are still there after garbage collection and `settle_s`: a process
    that was told to end gets the time to do so."""
    found = leaks(before, snapshot())
    deadline = time.monotonic() + settle_s
    while found and time.monotonic() < deadline:
        gc.collect()
        found = leaks(before, snapshot())
        if found:
            time.sleep(0.05)
    return found


def kill_leaked_processes(before: Snapshot) -> None:
    """So that one leaking test does not fail all that follow it."""
    for pid, _ in snapshot().processes - before.processes:
        with suppress(psutil.NoSuchProcess):
            psutil.Process(pid).kill()


def our_shm_files() -> set[str]:
    """Names in /dev/shm. Tests run beside other programs, and beside each other: a file that a
    process has mapped which is none of our descendants is not ours."""
    names = os.listdir(_SHM) if os.path.isdir(_SHM) else ()
    found = {name for name in names if not name.startswith(_OPENMP)}
    _theirs.intersection_update(found)
    if unknown := found - _theirs:
        mapped = set(_shm_inodes_of_others())
        for name in unknown:
            with suppress(FileNotFoundError):
                if os.stat(f"{_SHM}/{name}").st_ino in mapped:
                    _theirs.add(name)
    return found - _theirs


def _shm_inodes_of_others() -> Iterator[int]:
    """By inode, as a named semaphore is mapped under a name that it has lost since."""
    ours = {os.getpid(), *_descendants(), *_orphans()}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) not in ours:
            with suppress(OSError):  # the process has ended
                for line in (entry / "maps").read_text().splitlines():
                    if f" {_SHM}/" in line:
                        yield int(line.split()[4])


def _processes(fresh: bool = False) -> Iterator[tuple[int, str]]:
    for pid in _descendants() if fresh else _descendants().union(_orphans()):
        with suppress(psutil.Error):
            process = psutil.Process(pid)
            line = " ".join(process.cmdline())
            is_helper = any(name in line for name in _MULTIPROCESSING_HELPERS)
            if is_helper and process.ppid() == os.getpid():
                continue
            yield process.pid, f"{process.name()} [{process.status()}] {line[:200]}"


def _descendants() -> set[int]:
    """As the kernel lists them, where it does; to look for them among all processes takes longer
    than most tests do."""
    if not Path(f"/proc/self/task/{threading.get_native_id()}/children").exists():
        return {process.pid for process in psutil.Process().children(recursive=True)}
    found: set[int] = set()
    left = [os.getpid()]
    while left:
        children = _children(left.pop()) - found
        found |= children
        left += children
    return found


def _children(pid: int) -> set[int]:
    found: set[int] = set()
    with suppress(OSError):  # the process has ended
        for task in Path(f"/proc/{pid}/task").iterdir():
            with suppress(OSError):  # the thread has
                found.update(map(int, (task / "children").read_text().split()))
    return found


def _orphans() -> Iterator[int]:
    """Processes that were started with our runtime directory, some of whose parents have died."""
    runtime_dir = os.environ.get(RUNTIME_DIR_VARIABLE)
    if not runtime_dir:
        return
    wanted = f"{RUNTIME_DIR_VARIABLE}={runtime_dir}\0".encode()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with suppress(OSError):
            if wanted in (entry / "environ").read_bytes() + b"\0":
                yield int(entry.name)


def _fds() -> Iterator[tuple[int, str]]:
    kept = {
        getattr(resource_tracker._resource_tracker, "_fd", None),
        getattr(forkserver._forkserver, "_forkserver_alive_fd", None),
    }
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        with suppress(OSError):  # the descriptor of the listing itself is gone by now
            target = os.readlink(f"/proc/self/fd/{fd}")
            if fd not in kept and not _KEPT_OPEN.fullmatch(target):
                yield fd, target


def _memfd_mappings() -> Iterator[str]:
    for line in Path("/proc/self/maps").read_text().splitlines():
        match = _MEMFD.search(line)
        if match and not match.group(1).startswith(_LIBFFI_MEMFD):
            yield f"{match.group(1)} at {line.split(' ', 1)[0]}"


def _held_locks() -> Iterator[str]:
    runtime_dir = Path(os.environ.get(RUNTIME_DIR_VARIABLE, "/nonexistent"))
    if runtime_dir.is_dir():
        for run_dir in runtime_dir.iterdir():
            if launcher_pid(run_dir) is not None:
                yield str(run_dir)
