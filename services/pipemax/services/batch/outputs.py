"""Where result lines go: appended one by one, whole, and on disk before long."""

import gzip
import importlib
import io
import os
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final

from pipemax.proto.errors import ConfigError, PipemaxSystemError
from pipemax.services.batch import parquet, zst

STDOUT: Final = Path("-")
SYNC_INTERVAL_S = 5.0
"""After a power cut at most the results of so many seconds are computed again."""
_PACKED = (".gz", ".zst", ".parquet")
_COPY_BYTES = 2**20
_PARQUET_ROWS = 4096


def check_output(path: Path) -> None:
    """Raises ConfigError unless results can be written to `path`: to be called before anything is
    loaded. Leaves nothing behind and an existing file as it is."""
    if path == STDOUT:
        return
    if path.suffix == ".parquet":
        parquet.library(path)
    elif path.suffix == ".zst":
        zst.library()
    try:
        existed = path.exists() or path.is_symlink()
        with path.open("ab"):
            pass
        if not existed:
            path.unlink()
    except OSError as error:
        raise ConfigError(
            f"cannot write {path}: {error.strerror}; give a path in a writable folder"
        ) from error


def working_file(path: Path) -> Path:
    """Where the lines of `path` are appended while the batch runs: packed formats cannot be
    appended to and torn ends not be repaired, so they are made of the plain lines at the end."""
    return path.with_name(path.name + ".partial") if path.suffix in _PACKED else path


class ResultFile:
    """Appends lines to a file. Unbuffered: a line is with the kernel as soon as its request is
    done, so that it outlives this process; what the disk has is at most SYNC_INTERVAL_S older.

    Raises PipemaxSystemError when it cannot be written; what was written stays.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.path = path
        self._clock = clock
        self._synced_at = clock()
        self._unsynced = False
        self._closed = False
        try:
            if path == STDOUT:
                self._file: Any = io.FileIO(sys.stdout.fileno(), "wb", closefd=False)
            else:
                self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise self._failed(error) from error

    def write(self, line: bytes) -> None:
        """`line` has no line break."""
        rest = memoryview(line + b"\n")
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise self._failed(error) from error
        self._unsynced = True
        if self._clock() - self._synced_at >= SYNC_INTERVAL_S:
            self.sync()

    def sync(self) -> None:
        """Returns once everything written is on disk, where there is one."""
        self._synced_at = self._clock()
        self._check_still_there()
        if not self._unsynced:
            return
        self._unsynced = False
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            if self._is_regular():
                raise self._failed(error) from error

    def close(self) -> None:
        """Safe to call twice."""
        if not self._closed:
            self._closed = True
            try:
                self.sync()
            finally:
                self._file.close()

    def _check_still_there(self) -> None:
        """A file that was removed takes lines without a word, and they are gone with this
        process."""
        mine = os.fstat(self._file.fileno())
        if not stat.S_ISREG(mine.st_mode) or self.path == STDOUT:
            return
        try:
            found = self.path.stat()
        except OSError as error:
            raise self._failed(error) from error
        if (found.st_dev, found.st_ino) != (mine.st_dev, mine.st_ino):
            raise PipemaxSystemError(
                f"{self.path} was replaced by another file while the batch ran; run the batch again"
            )

    def _is_regular(self) -> bool:
        return self.path != STDOUT and self.path.is_file()

    def _failed(self, error: OSError) -> PipemaxSystemError:
        return PipemaxSystemError(
            f"cannot write {self.path}: {error.strerror}; see to it and run the batch again: it "
            "goes on where it stopped"
        )


def repair_tail(path: Path) -> int:
    """Cuts off a last line that was not written whole; returns how many bytes it had."""
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        end = size
        while end:
            start = max(0, end - _COPY_BYTES)
            file.seek(start)
            found = file.read(end - start).rfind(b"\n")
            if found >= 0:
                end = start + found + 1
                break
            end = start
        if end < size:
            file.truncate(end)
            os.fsync(file.fileno())
        return size - end


def pack(working: Path, path: Path) -> None:
    """Makes `path` of its working file, which is then removed; does nothing for a plain file.
    Raises PipemaxSystemError when there is no room."""
    if working == path:
        return
    made = path.with_name(path.name + ".packing")
    try:
        if path.suffix == ".parquet":
            _write_parquet(working, made)
        else:
            with working.open("rb") as source, _packer(path, made) as target:
                shutil.copyfileobj(source, target, _COPY_BYTES)
        with made.open("rb+") as file:
            os.fsync(file.fileno())
        made.replace(path)
        working.unlink()
    except OSError as error:
        made.unlink(missing_ok=True)
        raise PipemaxSystemError(
            f"cannot write {path}: {error.strerror}; its lines are in {working}; make room and "
            "run the batch again"
        ) from error


def unpack(path: Path, working: Path) -> None:
    """The reverse of `pack`, for a second run over finished results."""
    if working == path:
        return
    made = working.with_name(working.name + ".unpacking")
    with made.open("wb") as target:
        for line in _packed_lines(path):
            target.write(line)
        os.fsync(target.fileno())
    made.replace(working)


def _packer(path: Path, made: Path) -> BinaryIO:
    if path.suffix == ".gz":
        return gzip.open(made, "wb")  # type: ignore[return-value]
    return zst.writer(made)


def _packed_lines(path: Path) -> Iterator[bytes]:
    if path.suffix == ".parquet":
        with parquet.library(path).ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=_PARQUET_ROWS, columns=["line"]):
                for text in batch.column("line").to_pylist():
                    yield text.encode(errors="surrogatepass") + b"\n"
    elif path.suffix == ".gz":
        with gzip.open(path, "rb") as source:
            yield from source
    else:
        with path.open("rb") as raw, zst.reader(raw) as source:
            yield from source


def _write_parquet(working: Path, made: Path) -> None:
    """Columns `custom_id`, `status_code`, `text` (of the first choice), `error`, and `line`, which
    is the whole result line."""
    import msgspec

    arrow = importlib.import_module("pyarrow")
    kinds = {"custom_id": "string", "status_code": "int32", "text": "string", "error": "string"}
    schema = arrow.schema(
        [(name, getattr(arrow, kind)()) for name, kind in {**kinds, "line": "string"}.items()]
    )
    with parquet.library(made).ParquetWriter(made, schema) as writer, working.open("rb") as source:
        rows: list[dict[str, Any]] = []
        for line in source:
            shown = columns_of(msgspec.json.decode(line))
            rows.append(shown | {"line": line.rstrip(b"\n").decode()})
            if len(rows) == _PARQUET_ROWS:
                writer.write_table(arrow.Table.from_pylist(rows, schema))
                rows.clear()
        writer.write_table(arrow.Table.from_pylist(rows, schema))


def columns_of(result: dict[str, Any]) -> dict[str, Any]:
    """What is shown of a result line where results are rows."""
    body = None if result["error"] else result["response"]["body"]
    choice = body["choices"][0] if body else {}
    message = choice.get("message") or {}
    return {
        "custom_id": result["custom_id"],
        "status_code": result["response"]["status_code"],
        "text": choice.get("text", message.get("content")),
        "error": result["error"] and result["error"]["message"],
    }
