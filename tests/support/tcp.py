"""Peers on a TCP port that do not follow the rules, and a line that can be cut."""

import contextlib
import selectors
import socket
import struct
import threading

_GREETING = (
    b"\xff" + b"\x00" * 8 + b"\x7f\x03\x01" + b"CURVE".ljust(20, b"\x00") + b"\x00" + b"\x00" * 31
)


def port_of(endpoint: str) -> int:
    return int(endpoint.rpartition(":")[2])


def connect(endpoint: str) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port_of(endpoint)), timeout=5)


def greeted(endpoint: str) -> socket.socket:
    """A peer that begins a CURVE handshake and has the other side's greeting."""
    peer = connect(endpoint)
    peer.sendall(_GREETING)
    got = b""
    while len(got) < 64:
        got += peer.recv(64 - len(got))
    return peer


def command_header(size: int) -> bytes:
    """Of a handshake command of so many bytes."""
    return b"\x06" + struct.pack(">Q", size)


def is_dropped(peer: socket.socket) -> bool:
    """Waits until the other side closes; False when it does not within 5 s."""
    try:
        while peer.recv(65536):
            pass
        return True
    except ConnectionError:
        return True
    except TimeoutError:
        return False


class Line:
    """Forwards connections to `endpoint`, until they are cut."""

    def __init__(self, endpoint: str) -> None:
        self._target = ("127.0.0.1", port_of(endpoint))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._lock = threading.Lock()
        self._other: dict[socket.socket, socket.socket] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="line")
        self.connections = 0

    def __enter__(self) -> "Line":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.cut()
        self._listener.close()
        self._selector.close()

    def cut(self) -> None:
        """Every connection breaks; new ones can be made."""
        with self._lock:
            for one in list(self._other):
                self._selector.unregister(one)
                one.close()
            self._other.clear()

    def _run(self) -> None:
        while not self._stop.is_set():
            for key, _ in self._selector.select(0.02):
                with self._lock, contextlib.suppress(OSError):
                    if key.fileobj is self._listener:
                        self._accept()
                    elif key.fileobj in self._other:
                        self._forward(key.fileobj)  # type: ignore[arg-type]

    def _accept(self) -> None:
        near, _ = self._listener.accept()
        far = socket.create_connection(self._target)
        self.connections += 1
        for one, other in ((near, far), (far, near)):
            self._other[one] = other
            self._selector.register(one, selectors.EVENT_READ)

    def _forward(self, source: socket.socket) -> None:
        data = source.recv(65536)
        if data:
            self._other[source].sendall(data)
            return
        for one in (source, self._other[source]):
            self._selector.unregister(one)
            self._other.pop(one)
            one.close()
