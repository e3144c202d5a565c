"""Peers that do not follow the rules, on a ZeroMQ Unix socket."""

import contextlib
import os
import random
import socket
from collections.abc import Iterator
from pathlib import Path

_GREETING = (
    b"\xff" + b"\x00" * 8 + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\x00") + b"\x00" + b"\x00" * 31
)
_READY = b"\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER\x08Identity\x00\x00\x00\x00"
_COMMAND, _MORE, _LONG = 0x04, 0x01, 0x02


class RawPeer:
    """A hand-made connection; `handshake` makes it a proper ZeroMQ peer."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(5)
        self.socket.connect(str(path))

    def handshake(self) -> "RawPeer":
        self.socket.sendall(_GREETING)
        self._read(64)
        self.socket.sendall(bytes([_COMMAND, len(_READY)]) + _READY)
        header = self._read(2)
        self._read(header[1])
        return self

    def send_frame_header(self, size: int, *, more: bool = False) -> None:
        flags = _LONG | (_MORE if more else 0)
        self.socket.sendall(bytes([flags]) + size.to_bytes(8, "big"))

    def send_frame(self, payload: bytes, *, more: bool = False) -> None:
        self.send_frame_header(len(payload), more=more)
        self.socket.sendall(payload)

    def is_dropped(self) -> bool:
        """Waits until the other side closes the connection; False when it does not."""
        try:
            while self.socket.recv(4096):
                pass
            return True
        except ConnectionError:
            return True
        except TimeoutError:
            return False

    def close(self) -> None:
        self.socket.close()

    def _read(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            piece = self.socket.recv(count - len(data))
            if not piece:
                raise ConnectionError("closed during the handshake")
            data += piece
        return data


def send_noise(path: Path, seed: int) -> None:
    """Random bytes, before and after a proper handshake."""
    noise = random.Random(seed)
    for shake in (False, True):
        peer = RawPeer(path)
        with contextlib.suppress(OSError):
            if shake:
                peer.handshake()
            peer.socket.sendall(noise.randbytes(noise.randrange(1, 4096)))
        peer.close()


@contextlib.contextmanager
def silent_connections(path: Path, count: int) -> Iterator[int]:
    """Up to `count` connections that say nothing, held by another process; yields how many."""
    ready_read, ready_write = os.pipe()
    hold_read, hold_write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(ready_read)
        os.close(hold_write)
        held = []
        with contextlib.suppress(OSError):
            for _ in range(count):
                one = socket.socket(socket.AF_UNIX)
                one.connect(str(path))
                held.append(one)
        os.write(ready_write, len(held).to_bytes(4, "big"))
        os.read(hold_read, 1)
        os._exit(0)
    os.close(ready_write)
    os.close(hold_read)
    try:
        yield int.from_bytes(os.read(ready_read, 4), "big")
    finally:
        os.close(hold_write)
        os.waitpid(child, 0)
        os.close(ready_read)
