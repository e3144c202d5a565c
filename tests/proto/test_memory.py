"""Shared memory between live processes: who can map it, what guards it, when it is gone."""

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest

from pipemax.proto.errors import PipemaxSystemError
from pipemax.proto.memory import MemfdHandle, SharedMemory

_PEER = """
import sys
import msgspec
from pipemax.proto.memory import MemfdHandle, SharedMemory

memory = SharedMemory.open(msgspec.json.decode(sys.argv[1], type=MemfdHandle))
memory.buffer[:5] = bytes(memory.buffer[:5]).upper()
memory.close()
"""
_OWNER = """
import sys
import msgspec
from pipemax.proto.memory import SharedMemory

memory = SharedMemory.create("owner", 8192)
memory.buffer[:5] = b"owner"
print(msgspec.json.encode(memory.handle).decode(), flush=True)
sys.stdin.read()
"""


def _open_memfds() -> list[int]:
    found = []
    for fd in map(int, os.listdir("/proc/self/fd")):
        with suppress(OSError):  # the descriptor that listed the folder
            if os.readlink(f"/proc/self/fd/{fd}").startswith("/memfd:"):
                found.append(fd)
    return found


def test_another_process_reads_and_writes_it() -> None:
    memory = SharedMemory.create("test", 8192)
    try:
        memory.buffer[:5] = b"hello"
        handle = msgspec.json.encode(memory.handle).decode()
        subprocess.run([sys.executable, "-c", _PEER, handle], check=True, timeout=60)
        assert bytes(memory.buffer[:6]) == b"HELLO\0"
    finally:
        memory.close()


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="no huge pages in this kernel"
)
def test_huge_pages_are_asked_for_by_owner_and_peer() -> None:
    before = _mappings_that_ask_for_huge_pages()
    memory = SharedMemory.create("test", 2**22)
    peer = SharedMemory.open(memory.handle)
    try:
        assert _mappings_that_ask_for_huge_pages() == before + 2
    finally:
        peer.close()
        memory.close()


def _mappings_that_ask_for_huge_pages() -> int:
    lines = Path("/proc/self/smaps").read_text().splitlines()
    return sum(line.startswith("VmFlags:") and " hg" in line for line in lines)


def test_it_outlives_its_owner_while_mapped_and_cannot_be_opened_anew() -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", _OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with owner:
        assert owner.stdout is not None
        handle = msgspec.json.decode(owner.stdout.readline(), type=MemfdHandle)
        memory = SharedMemory.open(handle)
        owner.kill()
        owner.wait()
    assert bytes(memory.buffer[:5]) == b"owner"
    memory.close()
    with pytest.raises(PipemaxSystemError, match=f"process {handle.pid}'s memory is gone"):
        SharedMemory.open(handle)


@pytest.mark.parametrize("change", [{"inode": 1}, {"size_bytes": 4096}])
def test_a_reused_descriptor_is_not_mapped(change: dict[str, int]) -> None:
    memory = SharedMemory.create("test", 8192)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(PipemaxSystemError, match="replaced by another file"):
        SharedMemory.open(msgspec.structs.replace(memory.handle, **change))
    assert len(os.listdir("/proc/self/fd")) == before
    memory.close()


@pytest.mark.parametrize("size_bytes", [0, 4096, 16384])
def test_its_size_is_sealed(size_bytes: int) -> None:
    """A peer that shrank it would kill everyone who touches the lost pages."""
    memory = SharedMemory.create("test", 8192)
    with pytest.raises(PermissionError):
        os.ftruncate(memory.handle.fd, size_bytes)
    memory.close()


@pytest.mark.parametrize("size_bytes", [0, -1])
def test_an_empty_segment_is_refused(size_bytes: int) -> None:
    with pytest.raises(ValueError, match="shared memory of"):
        SharedMemory.create("test", size_bytes)


def test_close_returns_everything_and_may_be_repeated() -> None:
    before = _open_memfds()
    memory = SharedMemory.create("test", 8192)
    assert len(_open_memfds()) > len(before)
    memory.close()
    memory.close()
    assert _open_memfds() == before
    assert "/memfd:test" not in Path("/proc/self/maps").read_text()


def test_views_outlive_close() -> None:
    """An array over the pool may still be referenced when its process shuts down."""
    memory = SharedMemory.create("test", 8192)
    memory.buffer[0] = 7
    view = memory.buffer[:16]
    memory.close()
    assert view[0] == 7
    view.release()


def test_exported_buffers_outlive_close() -> None:
    memory = SharedMemory.create("test", 8192)
    typed = memoryview(memory.buffer).cast("i")
    memory.close()
    typed[0] = 42
    assert typed[0] == 42
    typed.release()


def test_prefault_keeps_what_is_there() -> None:
    memory = SharedMemory.create("test", 1 << 20)
    memory.buffer[:5] = b"hello"
    memory.prefault()
    assert bytes(memory.buffer[:5]) == b"hello"
    memory.close()
