"""Shared memory between processes of one machine, without names.

A memfd has no name to clean up or to guess: it is gone when the last process that mapped it is
gone, however it died. A process opens another's memfd through `/proc/<pid>/fd/<n>`, which the
kernel allows to the same user only; the inode number in the handle guards against a reused pid.
"""

import contextlib
import ctypes
import fcntl
import mmap
import os

import msgspec

from pipemax.proto.errors import PipemaxSystemError

F_ADD_SEALS = getattr(fcntl, "F_ADD_SEALS", 1033)
_SEAL_SHRINK_GROW_SEAL = 0x0002 | 0x0004 | 0x0001
_MADV_POPULATE_WRITE = getattr(mmap, "MADV_POPULATE_WRITE", 23)
_POPULATE_BYTES = 16 * 2**20


class MemfdHandle(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Names a live process's memfd."""

    pid: int
    fd: int
    inode: int
    size_bytes: int


class SharedMemory:
    """A mapped memfd. `buffer` is writable and `size_bytes` long."""

    def __init__(self, fd: int, size_bytes: int) -> None:
        self._fd = fd
        self.size_bytes = size_bytes
        self._map = mmap.mmap(fd, size_bytes)
        with contextlib.suppress(OSError):  # a kernel built without them
            # Where the machine allows it (shmem_enabled: see ops/docs/tuning.md): KV is read in
            # pieces of a few KiB from all over, and small pages cost each of them a search.
            self._map.madvise(mmap.MADV_HUGEPAGE)
        self.buffer = memoryview(self._map)

    @classmethod
    def create(cls, name: str, size_bytes: int) -> "SharedMemory":
        """A new segment of fixed size (sealed, so that no peer can shrink it under us)."""
        if size_bytes <= 0:
            raise ValueError(f"shared memory of {size_bytes} bytes")
        fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, size_bytes)
            fcntl.fcntl(fd, F_ADD_SEALS, _SEAL_SHRINK_GROW_SEAL)
            return cls(fd, size_bytes)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def open(cls, handle: MemfdHandle) -> "SharedMemory":
        """Maps another process's segment. Raises PipemaxSystemError when it is gone."""
        try:
            fd = os.open(f"/proc/{handle.pid}/fd/{handle.fd}", os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise PipemaxSystemError(f"process {handle.pid}'s memory is gone: {error}") from error
        found = os.fstat(fd)
        if found.st_ino != handle.inode or found.st_size != handle.size_bytes:
            os.close(fd)
            raise PipemaxSystemError(f"process {handle.pid}'s memory was replaced by another file")
        try:
            return cls(fd, handle.size_bytes)
        except BaseException:
            os.close(fd)
            raise

    @property
    def handle(self) -> MemfdHandle:
        """Valid as long as this process lives and the segment is not closed."""
        return MemfdHandle(
            pid=os.getpid(),
            fd=self._fd,
            inode=os.fstat(self._fd).st_ino,
            size_bytes=self.size_bytes,
        )

    def prefault(self) -> None:
        """Touches every page now (about 1 s per GiB), so that no copy pays for it later. What the
        segment holds stays. Other threads run meanwhile, and may map memory themselves."""
        if self._populate():
            return
        page = mmap.PAGESIZE
        for offset in range(0, self.size_bytes, page):
            self.buffer[offset] = self.buffer[offset]

    def _populate(self) -> bool:
        """Has the kernel touch every page, through ctypes, which lets go of the interpreter lock
        as `mmap.madvise` does not; in pieces, as it holds the lock of the address space, for which
        an import that maps a library waits. False: this kernel does not know how (before 5.14)."""
        madvise = ctypes.CDLL(None, use_errno=True).madvise
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        for offset in range(0, self.size_bytes, _POPULATE_BYTES):
            length = min(_POPULATE_BYTES, self.size_bytes - offset)
            address, size = ctypes.c_void_p(start + offset), ctypes.c_size_t(length)
            if madvise(address, size, _MADV_POPULATE_WRITE):
                return False
        return True

    def close(self) -> None:
        """Unmaps; safe to call twice. Views taken of `buffer` keep the mapping alive until they
        are gone themselves."""
        if self._fd < 0:
            return
        os.close(self._fd)
        self._fd = -1
        with contextlib.suppress(BufferError):
            self.buffer.release()
            self._map.close()
