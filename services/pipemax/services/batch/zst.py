"""Zstandard files. The library is imported with the first of them: all else works without it."""

import io
from pathlib import Path
from typing import Any, BinaryIO

from pipemax.proto.errors import ConfigError

_READ_BYTES = 2**20
_STEP_BYTES = 512
"""Unpacked at a time: a block of the format is at least 4 bytes and becomes at most 128 KiB, so
that these become at most 16 MiB, and not what a whole file of blanks unpacks to."""


class _Frames(io.RawIOBase):
    """The content of a file's frames, one after the other. Raises EOFError when it ends within one,
    which the library's own reader takes for the end, and OSError for what is no frame."""

    def __init__(self, raw: BinaryIO, library: Any) -> None:
        self._raw = raw
        self._library = library
        self._frame: Any = None
        """The one being read; None between two."""
        self._packed = memoryview(b"")
        """Read and not unpacked yet."""
        self._content = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        target = memoryview(buffer).cast("B")
        while not self._content:
            if not self._read_more():
                return 0
        count = min(len(target), len(self._content))
        target[:count] = self._content[:count]
        self._content = self._content[count:]
        return count

    def _read_more(self) -> bool:
        """False at the end of the file."""
        if not self._packed:
            self._packed = memoryview(self._raw.read(_READ_BYTES))
        if not self._packed:
            if self._frame is not None:
                raise EOFError("the file ends in the middle of a zstandard frame")
            return False
        if self._frame is None:
            self._frame = self._library.ZstdDecompressor().decompressobj()
        step = self._packed[:_STEP_BYTES]
        try:
            self._content = memoryview(self._frame.decompress(step))
        except self._library.ZstdError as error:
            raise OSError(str(error)) from error
        used = len(step)
        if self._frame.eof:
            used -= len(self._frame.unused_data)  # which is of the next frame
            self._frame = None
        self._packed = self._packed[used:]
        return True


def reader(raw: BinaryIO) -> io.BufferedReader:
    """What the frames in `raw` hold."""
    return io.BufferedReader(_Frames(raw, library()), _READ_BYTES)


def writer(path: Path) -> BinaryIO:
    file: BinaryIO = library().open(path, "wb")
    return file


def library() -> Any:
    """Raises ConfigError when it is not installed."""
    try:
        import zstandard
    except ImportError as error:
        raise ConfigError(
            f".zst files need zstandard ({error}); pip install zstandard, or give .gz or .jsonl"
        ) from error
    return zstandard
