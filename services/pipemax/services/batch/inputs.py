"""Batch lines from files: plain, compressed, columns, or a pipe; never held as a whole."""

import contextlib
import gzip
import hashlib
import json
import stat
import sys
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

from pipemax.proto.errors import ConfigError, PipemaxSystemError
from pipemax.services.batch import parquet, zst

MAX_LINE_BYTES = 16 * 2**20
"""Longest input line; longer ones could not be sent to the coordinator."""
STDIN: Final = Path("-")
_READ_BYTES = 2**20
_PARQUET_ROWS = 1024
"""Rows of a Parquet file read at a time."""
_UTF8_MARK = b"\xef\xbb\xbf"
COLUMNS: Final = ("custom_id", "method", "url", "body")


@dataclass(frozen=True, slots=True)
class InputLine:
    """A line that is not blank."""

    number: int
    """In its file, from 1; of a Parquet file, the row."""
    text: bytes | None
    """None: longer than MAX_LINE_BYTES."""


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What a second run knows a file by."""

    lines: int
    """That are not blank."""
    size_bytes: int
    blake2b: str
    """Of the file as it is, compressed or not; 128 bits, hexadecimal."""


def check_input(path: Path) -> None:
    """Raises ConfigError unless `path` can be read: a regular file, which is read twice (its lines
    are counted first), or `-`."""
    if path == STDIN:
        return
    try:
        if not (path.is_dir() or stat.S_ISREG(path.stat().st_mode)):
            raise ConfigError(
                f"cannot read {path}: not a regular file; write the lines to one, or pipe them "
                "into `-i -`"
            )
        with path.open("rb"):
            pass
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; give a .jsonl file") from error
    if path.suffix == ".parquet":
        _columns_of(path)
    elif path.suffix == ".zst":
        zst.library()


def fingerprint(path: Path) -> Fingerprint:
    """Reads the whole file once, a compressed one twice. Raises PipemaxSystemError as `lines`."""
    digest = hashlib.blake2b(digest_size=16)
    size_bytes = 0
    with path.open("rb") as source:
        while part := source.read(_READ_BYTES):
            digest.update(part)
            size_bytes += len(part)
    return Fingerprint(sum(1 for _ in lines(path)), size_bytes, digest.hexdigest())


def lines(path: Path) -> Iterator[InputLine]:
    """The lines of a file by its suffix: `.gz`, `.zst`, `.parquet`, else plain; `-` is stdin.

    Raises PipemaxSystemError that names the line behind which the file cannot be read.
    """
    number = 0
    try:
        for line in _rows(path) if path.suffix == ".parquet" else _text_lines(path):
            number = line.number
            yield line
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise PipemaxSystemError(
            f"cannot read {path} behind line {number}: {reason}; mend the file and run the batch "
            "again: it goes on where it stopped"
        ) from error


def _text_lines(path: Path) -> Iterator[InputLine]:
    with ExitStack() as stack:
        yield from _split(_opened(path, stack))


def _opened(path: Path, stack: ExitStack) -> BinaryIO:
    if path == STDIN:
        return sys.stdin.buffer
    raw = stack.enter_context(path.open("rb"))
    if path.suffix == ".gz":
        return stack.enter_context(gzip.GzipFile(fileobj=raw))  # type: ignore[return-value]
    if path.suffix == ".zst":
        return stack.enter_context(zst.reader(raw))
    return raw


def _split(source: BinaryIO) -> Iterator[InputLine]:
    number = 0
    while line := source.readline(MAX_LINE_BYTES + 1):
        number += 1
        if number == 1:
            line = line.removeprefix(_UTF8_MARK)
        if len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
            while (rest := source.readline(_READ_BYTES)) and not rest.endswith(b"\n"):
                pass
            yield InputLine(number, None)
        elif line.strip():
            yield InputLine(number, line)


def _rows(path: Path) -> Iterator[InputLine]:
    """A row is a line: `body` is a struct, or a string of JSON."""
    columns = _columns_of(path)
    with parquet.library(path).ParquetFile(path) as table:
        number = 0
        for batch in table.iter_batches(batch_size=_PARQUET_ROWS, columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield InputLine(number, row_text(row))


def row_text(row: dict[str, Any]) -> bytes | None:
    """The line of a row with COLUMNS; None when it is longer than MAX_LINE_BYTES."""
    if isinstance(row.get("body"), str):
        with contextlib.suppress(ValueError):  # then refused as a body that is no object
            row["body"] = json.loads(row["body"])
    elif isinstance(row.get("body"), dict):
        # Rows of one file share their fields: one that is null was not given.
        row["body"] = {name: value for name, value in row["body"].items() if value is not None}
    text = json.dumps(row, ensure_ascii=False, default=str).encode(errors="surrogatepass")
    return text if len(text) <= MAX_LINE_BYTES else None


def _columns_of(path: Path) -> list[str]:
    """Raises ConfigError when the file is no Parquet file, or has other columns than a line."""
    library = parquet.library(path)
    try:
        names = list(library.read_schema(path).names)
    except Exception as error:  # pyarrow's own hierarchy, from a module that may be absent
        raise ConfigError(f"cannot read {path}: {error}") from error
    if sorted(names) != sorted(COLUMNS):
        raise ConfigError(f"{path} has the columns {names}; a batch file has {list(COLUMNS)}")
    return names
