"""Folders of CURVE keys. A key is a file with one line of Z85 text.

The system's folder, which stays where the system runs::

    server.key        secret
    server.pub
    clients/NAME.pub  who is let in: one file for each client, looked at on every connection
    issued/NAME/      a client's folder, made here, to be moved to that client's machine

A client's folder::

    client.key        secret
    server.pub        whom it talks to

Folders have mode 0700, files 0600.
"""

import contextlib
import logging
import os
import re
import stat
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import zmq

from pipemax.proto.curve import KeyPair
from pipemax.proto.errors import ConfigError

log = logging.getLogger(__name__)

SERVER_SECRET: Final = "server.key"
SERVER_PUBLIC: Final = "server.pub"
CLIENT_SECRET: Final = "client.key"
CLIENTS: Final = "clients"
ISSUED: Final = "issued"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""Of a client."""
MAX_CLIENTS = 1024
"""Files of `clients/` that are looked at; further ones are refused by name when they are made."""
_Z85_KEY = re.compile(r"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")
_MAX_FILE_BYTES = 256


@dataclass(frozen=True, slots=True)
class ClientKeys:
    own: KeyPair
    server_public: str


def load_server(folder: Path) -> KeyPair:
    """Raises ConfigError when the folder has no usable server key, or others can enter it."""
    check_private(folder, f"make one with `pipemax keys init --keys {folder}`")
    return _pair(folder / SERVER_SECRET, f"make one with `pipemax keys init --keys {folder}`")


def load_client(folder: Path) -> ClientKeys:
    """Raises ConfigError when the folder has no usable client key and server key, or others can
    enter it."""
    todo = "ask whoever runs the system for a folder made by `pipemax keys add`"
    check_private(folder, todo)
    return ClientKeys(
        _pair(folder / CLIENT_SECRET, todo), read_key(folder / SERVER_PUBLIC, secret=False)
    )


def read_key(path: Path, *, secret: bool, todo: str = "") -> str:
    """Raises ConfigError for what is no key; a secret one may be readable by its owner only."""
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            text = file.read(_MAX_FILE_BYTES).decode(errors="replace").strip()
    except OSError as error:
        also = f"; {todo}" if todo else ""
        raise ConfigError(f"cannot read the key {path}: {error.strerror}{also}") from error
    if secret and mode & 0o077:
        raise ConfigError(
            f"{path} is a secret and readable by others: make new keys, or `chmod 600` it if "
            "nobody has read it"
        )
    if not _Z85_KEY.fullmatch(text):
        raise ConfigError(f"{path} holds no key: one line of 40 characters (Z85)")
    return text


def check_private(folder: Path, todo: str) -> None:
    """Raises ConfigError unless `folder` is ours and nobody else can enter it."""
    try:
        found = folder.stat()
    except OSError as error:
        raise ConfigError(f"no key folder {folder}: {error.strerror}; {todo}") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise ConfigError(
            f"{folder} must be a folder of ours that nobody else can enter: `chmod 700` it"
        )


def replace_file(path: Path, content: bytes) -> None:
    """Writes `path`, mode 0600, so that a reader sees the old content or the new, never a part."""
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    draft.unlink(missing_ok=True)
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, content)
    finally:
        os.close(fd)
    draft.replace(path)


def client_files(folder: Path) -> Iterator[Path]:
    """Public keys of the clients that are let in, by name. Raises OSError."""
    with os.scandir(folder / CLIENTS) as entries:
        names = sorted(entry.name for entry in entries if entry.name.endswith(".pub"))
    for name in names[:MAX_CLIENTS]:
        yield folder / CLIENTS / name


class AllowedClients:
    """The keys in `clients/` as they are now: a file that was added or removed counts from the next
    connection on. Safe to use from any thread."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._seen: tuple[tuple[str, int, int], ...] | None = None
        self._keys: frozenset[str] = frozenset()

    def admits(self, public_key: str) -> bool:
        with self._lock:
            try:
                seen = tuple(_marks(self._folder))
            except OSError as error:
                if self._seen is not None:
                    log.warning("no client is let in: %s", error)
                self._seen, self._keys = None, frozenset()
                return False
            if seen != self._seen:
                self._seen, self._keys = seen, frozenset(self._read())
            return public_key in self._keys

    def _read(self) -> Iterator[str]:
        for path in client_files(self._folder):
            try:
                yield read_key(path, secret=False)
            except ConfigError as error:
                log.warning("a client is not let in: %s", error)


def _marks(folder: Path) -> Iterator[tuple[str, int, int]]:
    """By which a file that was changed or replaced is noticed."""
    for path in client_files(folder):
        with contextlib.suppress(FileNotFoundError):  # removed meanwhile
            found = path.stat()
            yield path.name, found.st_mtime_ns, found.st_ino


def _pair(path: Path, todo: str) -> KeyPair:
    secret = read_key(path, secret=True, todo=todo)
    try:
        return KeyPair(zmq.curve_public(secret.encode()).decode(), secret)
    except zmq.ZMQError as error:
        raise ConfigError(f"{path} holds no key ({error}); {todo}") from error
