"""The folder of files: content and a few words about each, kept until they are deleted.

A file is there when its words are: they are written last, whole, and removed first. All calls may
block on the disk; they may come from any thread.
"""

import contextlib
import fcntl
import os
import re
import secrets
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Literal, Self

import msgspec

from pipemax.proto.errors import ConfigError

Purpose = Literal["batch", "batch_output"]
_FILE_ID = re.compile(r"file-[0-9a-f]{32}")
_MODE = 0o600


class StoredFile(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a file. Field names are OpenAI's."""

    id: str
    bytes: int
    created_at: int
    """Unix time."""
    filename: str
    purpose: Purpose
    object: Literal["file"] = "file"
    status: Literal["processed"] = "processed"


def new_file_id() -> str:
    """Cannot be guessed: 128 random bits."""
    return f"file-{secrets.token_hex(16)}"


class FileStore:
    """Only one process has a folder at a time; its lock is the kernel's and ends with it."""

    def __init__(self, folder: Path) -> None:
        """Raises ConfigError when the folder cannot be used, or another server has it."""
        self._folder = folder / "files"
        self._lock = threading.Lock()
        self._files: dict[str, StoredFile] = {}
        try:
            _private(folder)
            _private(self._folder)
            self._lock_fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, _MODE)
        except OSError as error:
            raise ConfigError(
                f"cannot use {folder}: {error.strerror}; set PIPEMAX_STATE_DIR to a writable folder"
            ) from error
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock_fd)
            raise ConfigError(
                f"another `pipemax serve` uses {folder}: one at a time serves a system"
            ) from error
        self._load()

    def close(self) -> None:
        os.close(self._lock_fd)

    def _load(self) -> None:
        for path in self._folder.iterdir():
            if path.suffix == ".json" and _FILE_ID.fullmatch(path.stem):
                with contextlib.suppress(OSError, msgspec.DecodeError):
                    found = msgspec.json.decode(path.read_bytes(), type=StoredFile)
                    self._files[found.id] = found
        for path in self._folder.iterdir():
            if path.stem not in self._files:
                path.unlink(missing_ok=True)  # an upload that was not completed

    def get(self, file_id: str) -> StoredFile | None:
        with self._lock:
            return self._files.get(file_id)

    def all(self) -> list[StoredFile]:
        """Newest first."""
        with self._lock:
            found = list(self._files.values())
        return sorted(found, key=lambda file: (file.created_at, file.id), reverse=True)

    def path(self, file_id: str) -> Path:
        """Of the content of a file that is there."""
        return self._folder / f"{file_id}.data"

    def delete(self, file_id: str) -> bool:
        """Whether it was there."""
        with self._lock:
            if self._files.pop(file_id, None) is None:
                return False
        (self._folder / f"{file_id}.json").unlink(missing_ok=True)
        self.path(file_id).unlink(missing_ok=True)
        return True

    @contextlib.contextmanager
    def writing(self, file_id: str) -> Iterator["Draft"]:
        """A new file's content. It is there after `Draft.keep`; without that, nothing is left. One
        of that id that is there already is replaced."""
        draft = Draft(self, self._folder / f"{file_id}.part", file_id)
        try:
            yield draft
        finally:
            draft.discard()

    def _keep(self, draft: "Draft", filename: str, purpose: Purpose) -> StoredFile:
        found = StoredFile(
            id=draft.file_id,
            bytes=draft.size_bytes,
            created_at=int(time.time()),
            filename=filename,
            purpose=purpose,
        )
        draft.path.replace(self.path(found.id))
        try:
            write_whole(self._folder / f"{found.id}.json", msgspec.json.encode(found))
        except OSError:
            self.path(found.id).unlink(missing_ok=True)
            raise
        with self._lock:
            self._files[found.id] = found
        return found


class Draft:
    """A file that is being written."""

    def __init__(self, store: FileStore, path: Path, file_id: str) -> None:
        self._store = store
        self.path = path
        self.file_id = file_id
        self.size_bytes = 0
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, _MODE)
        self._file: IO[bytes] | None = os.fdopen(fd, "wb")

    def __enter__(self) -> Self:
        return self

    def write(self, piece: bytes) -> None:
        assert self._file is not None
        self._file.write(piece)
        self.size_bytes += len(piece)

    def keep(self, filename: str, purpose: Purpose) -> StoredFile:
        """Everything is on the disk when this returns."""
        assert self._file is not None
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        return self._store._keep(self, filename, purpose)

    def discard(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
            self.path.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes) -> None:
    """As a whole or not at all, and on the disk when this returns."""
    made = path.with_name(path.name + ".new")
    fd = os.open(made, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, _MODE)
    with os.fdopen(fd, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    made.replace(path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _private(folder: Path) -> None:
    """Makes it with mode 0700, and so what is missing above it, where journals go too. Raises
    ConfigError for one that others can enter."""
    for missing in [path for path in reversed(folder.parents) if not path.exists()]:
        missing.mkdir(mode=0o700, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if found.st_uid != os.getuid() or found.st_mode & 0o077 or not folder.is_dir():
        raise ConfigError(
            f"{folder} must be a folder of ours that nobody else can enter (mode 700); set "
            "PIPEMAX_STATE_DIR to one"
        )
