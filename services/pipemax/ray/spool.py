"""The lines that are to run, in a file that Ray's read tasks take their batches from.

Ray must be able to read a batch again when a node is lost with what it held, and only this process
knows which lines are to run. So they are written down first: to a file without a name, in the
folder for temporary files, that goes with this process. Read tasks run on this process's own node
and reach it through /proc.
"""

import contextlib
import importlib
import os
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from pipemax.proto.errors import PipemaxSystemError
from pipemax.ray.columns import LINE

_PIECE_ROWS = 8
"""Batches are made of whole pieces, so that their size need not be known while lines are read."""
_MOST_BATCH_BYTES = 32 * 2**20
POSITION, ROUTE, FILE, NUMBER = "position", "route", "file", "number"
_INTEGERS = (POSITION, ROUTE, FILE, NUMBER)


@dataclass(frozen=True, slots=True)
class Extent:
    """A batch: bytes of the spool."""

    offset: int
    size_bytes: int
    rows: int


class Spool:
    """Takes rows, then cuts them into batches. Raises PipemaxSystemError when there is no room."""

    def __init__(self) -> None:
        self._arrow = importlib.import_module("pyarrow")
        self._schema = self._arrow.schema(
            [*((name, self._arrow.int64()) for name in _INTEGERS), (LINE, self._arrow.binary())]
        )
        try:
            self._file = tempfile.TemporaryFile(buffering=2**20)  # noqa: SIM115
        except OSError as error:
            raise self._failed(error) from error
        self._rows: list[dict[str, Any]] = []
        self._ends = array("Q")
        """Of each piece, in bytes."""
        self.num_rows = 0

    def __enter__(self) -> "Spool":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with contextlib.suppress(OSError):  # of what was not written yet, and nobody needs now
            self._file.close()

    @property
    def path(self) -> str:
        """By which other processes on this machine read it, while it is open."""
        return f"/proc/{os.getpid()}/fd/{self._file.fileno()}"

    def add(self, route: int, file: int, number: int, line: bytes) -> None:
        """The line's place, and its text."""
        row = {POSITION: self.num_rows, ROUTE: route, FILE: file, NUMBER: number, LINE: line}
        self._rows.append(row)
        self.num_rows += 1
        if len(self._rows) == _PIECE_ROWS:
            self._write_piece()

    def batches(self, rows: int) -> list[Extent]:
        """Of about so many rows each, fewer where lines are long. To be called once all is in."""
        if self._rows:
            self._write_piece()
        try:
            self._file.flush()
        except OSError as error:
            raise self._failed(error) from error
        return list(_cut(self._ends, self.num_rows, max(1, rows // _PIECE_ROWS)))

    def _write_piece(self) -> None:
        table = self._arrow.Table.from_pylist(self._rows, self._schema)
        self._rows.clear()
        try:
            with self._arrow.ipc.new_stream(self._file, self._schema) as stream:
                stream.write_table(table)
            self._ends.append(self._file.tell())
        except OSError as error:
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> PipemaxSystemError:
        return PipemaxSystemError(
            f"cannot keep the lines that are to run in {tempfile.gettempdir()}: {error.strerror}; "
            "set TMPDIR to a folder with room for the input, and run the batch again"
        )


def _cut(ends: Sequence[int], num_rows: int, pieces: int) -> Iterator[Extent]:
    start = offset = 0
    while start < len(ends):
        stop = start + 1
        while (
            stop < len(ends) and stop - start < pieces and ends[stop] - offset <= _MOST_BATCH_BYTES
        ):
            stop += 1
        rows = min(stop * _PIECE_ROWS, num_rows) - start * _PIECE_ROWS
        yield Extent(offset, ends[stop - 1] - offset, rows)
        start, offset = stop, ends[stop - 1]


def read_extent(path: str, extent: Extent) -> Any:
    """The batch as a pyarrow Table."""
    arrow = importlib.import_module("pyarrow")
    pieces = []
    with open(path, "rb") as file:
        file.seek(extent.offset)
        data = arrow.BufferReader(file.read(extent.size_bytes))
    while data.tell() < extent.size_bytes:
        with arrow.ipc.open_stream(data) as stream:
            pieces.append(stream.read_all())
    return arrow.concat_tables(pieces).combine_chunks()
