"""`pipemax keys`: folders of CURVE keys made, added to, listed. Their layout is that of
`proto/key_files.py`."""

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

from pipemax.proto.curve import make_key_pair
from pipemax.proto.errors import ConfigError
from pipemax.proto.key_files import (
    CLIENT_SECRET,
    CLIENTS,
    ISSUED,
    MAX_CLIENTS,
    NAME,
    SERVER_PUBLIC,
    SERVER_SECRET,
    check_private,
    client_files,
    load_server,
    read_key,
    replace_file,
)


@dataclass(frozen=True, slots=True)
class Client:
    """One that is let in."""

    name: str
    public_key: str
    """Empty: its file holds no key, so that nobody is let in by it."""
    issued: Path | None
    """Its folder with the secret key, as long as that is here."""


def create(folder: Path) -> None:
    """A key for a system, and nobody let in yet. Raises ConfigError when there is one already:
    clients know it."""
    if (folder / SERVER_SECRET).exists():
        raise ConfigError(
            f"{folder} has a server key already, by which clients know the system; give another "
            "folder, or remove it and give every client a new folder"
        )
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        check_private(folder, "give another")
        for name in (CLIENTS, ISSUED):
            (folder / name).mkdir(mode=0o700, exist_ok=True)
        pair = make_key_pair()
        _write(folder / SERVER_PUBLIC, pair.public)
        _write(folder / SERVER_SECRET, pair.secret)
    except OSError as error:
        raise _cannot(folder, error) from error


def add(folder: Path, name: str) -> Path:
    """Lets a new client in. Returns the folder to be moved to its machine. Raises ConfigError for a
    name that is taken or none, and when there is no server key."""
    _check_name(name)
    server = load_server(folder)
    public, issued = folder / CLIENTS / f"{name}.pub", folder / ISSUED / name
    if public.exists() or issued.exists():
        raise ConfigError(
            f"{folder} has a client {name!r} already; remove it first (`pipemax keys remove "
            f"{name}`), or take another name"
        )
    try:
        if len(list(client_files(folder))) >= MAX_CLIENTS:
            raise ConfigError(f"{folder} lets {MAX_CLIENTS} clients in, which is the most")
        (folder / ISSUED).mkdir(mode=0o700, exist_ok=True)
        issued.mkdir(mode=0o700)
        pair = make_key_pair()
        _write(issued / CLIENT_SECRET, pair.secret)
        _write(issued / SERVER_PUBLIC, server.public)
        _write(public, pair.public)
    except OSError as error:
        raise _cannot(folder, error) from error
    return issued


def remove(folder: Path, name: str) -> None:
    """The client is not let in any more when it connects the next time. Raises ConfigError when
    there is none of that name."""
    _check_name(name)
    public, issued = folder / CLIENTS / f"{name}.pub", folder / ISSUED / name
    try:
        if not public.exists() and not issued.exists():
            raise ConfigError(f"{folder} has no client {name!r}; see `pipemax keys list`")
        public.unlink(missing_ok=True)
        for left in (issued / CLIENT_SECRET, issued / SERVER_PUBLIC):
            left.unlink(missing_ok=True)
        if issued.exists():
            issued.rmdir()
    except OSError as error:
        raise _cannot(folder, error) from error


def clients(folder: Path) -> list[Client]:
    """Who is let in, by name. Raises ConfigError when the folder has no server key."""
    load_server(folder)
    found = []
    try:
        for path in client_files(folder):
            name, key = path.stem, ""
            with contextlib.suppress(ConfigError):
                key = read_key(path, secret=False)
            issued = folder / ISSUED / name
            secret = (issued / CLIENT_SECRET).exists()
            found.append(Client(name, key, issued if secret else None))
    except OSError as error:
        raise _cannot(folder, error) from error
    return found


def _write(path: Path, key: str) -> None:
    replace_file(path, key.encode() + b"\n")
    fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _check_name(name: str) -> None:
    if not NAME.fullmatch(name):
        raise ConfigError(
            f"{name!r:.100} is no name of a client: use at most 64 letters, digits, dots, dashes "
            "and underscores"
        )


def _cannot(folder: Path, error: OSError) -> ConfigError:
    return ConfigError(f"cannot use the key folder {folder}: {error.strerror} ({error.filename})")
