"""Which lines have their results already: from the output that is there, and as the batch runs.

Ids are kept on disk beyond a bounded cache, so that a file of any length can be checked for ids
that occur twice.
"""

import hashlib
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from pipemax.proto.errors import ConfigError
from pipemax.services.batch.outputs import repair_tail

_CACHE_KIB = 32 * 1024
_DIGEST_BYTES = 16
"""Ids are told apart by 128 bits: of a billion, two are taken for one with a chance of 1e-21."""


class _Error(msgspec.Struct):
    line: int | None = None
    file: str | None = None


class _Result(msgspec.Struct):
    custom_id: str | None
    error: _Error | None


class Ledger:
    """The ids and failed lines of one output."""

    def __init__(self) -> None:
        self._db = sqlite3.connect("", isolation_level=None)  # a file that is nobody else's
        for statement in (
            f"PRAGMA cache_size = -{_CACHE_KIB}",
            "PRAGMA journal_mode = OFF",
            "PRAGMA synchronous = OFF",
            # line NULL: has its result from an earlier run.
            "CREATE TABLE ids (digest BLOB PRIMARY KEY, file INT, line INT) WITHOUT ROWID",
            "CREATE TABLE failed (file TEXT, line INT, PRIMARY KEY (file, line)) WITHOUT ROWID",
            "BEGIN",
        ):
            self._db.execute(statement)
        self.finished = 0
        """Results and error lines of earlier runs."""
        self._any_failed = False
        """Else no line need be looked up among those that did, which most batches have none of."""

    def load(self, path: Path) -> None:
        """Takes in the lines of an earlier run. Cuts off a last line that was not written whole.
        Raises ConfigError for lines that are no results."""
        if not path.exists():
            return
        repair_tail(path)
        for result, _ in _results(path):
            self.finished += 1
            if result.error is None:
                self._db.execute(
                    "INSERT OR IGNORE INTO ids VALUES (?, NULL, NULL)", (_digest(result.custom_id),)
                )
            else:
                self._any_failed = True
                place = (result.error.file or "", result.error.line)
                self._db.execute("INSERT OR IGNORE INTO failed VALUES (?, ?)", place)

    def claim(self, custom_id: str, file: int, line: int) -> tuple[int, int] | None:
        """Line `line` of input `file` uses this id. Returns who used it first, which is itself for
        a line that is to run; None when its result is there from an earlier run."""
        digest = _digest(custom_id)
        found = self._db.execute(
            "SELECT file, line FROM ids WHERE digest = ?", (digest,)
        ).fetchone()
        if found is None:
            self._db.execute("INSERT INTO ids VALUES (?, ?, ?)", (digest, file, line))
            return file, line
        if found[1] is not None:
            return found[0], found[1]
        self._db.execute("UPDATE ids SET file = ?, line = ? WHERE digest = ?", (file, line, digest))
        return None

    def has_failed(self, file: str, line: int) -> bool:
        """The line has its error line from an earlier run."""
        if not self._any_failed:
            return False
        place = (file, line)
        query = "SELECT 1 FROM failed WHERE file = ? AND line = ?"
        return self._db.execute(query, place).fetchone() is not None

    def close(self) -> None:
        self._db.close()


def drop_errors(path: Path) -> int:
    """Rewrites an output without its error lines, as a whole or not at all; returns how many
    there were."""
    if not path.exists():
        return 0
    repair_tail(path)
    made = path.with_name(path.name + ".new")
    dropped = 0
    with made.open("wb") as target:
        for result, text in _results(path):
            if result.error is None:
                target.write(text)
            else:
                dropped += 1
        target.flush()
        os.fsync(target.fileno())
    made.replace(path)
    return dropped


def _results(path: Path) -> Iterator[tuple[_Result, bytes]]:
    decoder = msgspec.json.Decoder(_Result)
    with path.open("rb") as source:
        for number, text in enumerate(source, 1):
            try:
                yield decoder.decode(text), text
            except msgspec.DecodeError as error:
                raise ConfigError(
                    f"{path}, line {number}, is no result of a batch ({error}); mend it, or give "
                    "--overwrite to start over"
                ) from error


def _digest(custom_id: Any) -> bytes:
    text = str(custom_id).encode(errors="surrogatepass")
    return hashlib.blake2b(text, digest_size=_DIGEST_BYTES).digest()
