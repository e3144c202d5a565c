"""Commits in a write-ahead log that SQLite will not find.

SQLite reads a log up to the first frame whose checksum is wrong and takes that for its end, which
is right where a write was cut short. If there are commits behind it, the file was damaged, and they
are lost without a word. Format: https://sqlite.org/fileformat2.html#the_write_ahead_log
"""

import struct
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

_HEADER = struct.Struct(">8I")
"""Magic, format, page size, checkpoints, two salts, two checksums."""
_FRAME = struct.Struct(">6I")
"""Page, pages of the database after a commit (else 0), two salts, two checksums."""
_SUMMED_BYTES = 8
"""Of a frame's header; then comes its page."""
_MAGIC = {0x377F0682: "<u4", 0x377F0683: ">u4"}
"""And the words that checksums are of."""

Sums = tuple[int, int]


def lost_frames(path: Path, page_bytes: int) -> int:
    """Pages that were committed to the log beside the database `path`, behind the first one that is
    damaged. 0 when there is none, or only the last one is incomplete."""
    try:
        with path.with_name(path.name + "-wal").open("rb") as file:
            return _Log(file, page_bytes).lost()
    except FileNotFoundError:
        return 0


class _Log:
    def __init__(self, file: BinaryIO, page_bytes: int) -> None:
        self._file = file
        self._page_bytes = page_bytes
        self._frame_bytes = _FRAME.size + page_bytes
        self._num_frames = (file.seek(0, 2) - _HEADER.size) // self._frame_bytes

    def lost(self) -> int:
        if self._num_frames < 1:
            return 0
        self._file.seek(0)
        header = self._file.read(_HEADER.size)
        magic, *_, salt_1, salt_2, sum_1, sum_2 = _HEADER.unpack(header)
        words = _MAGIC.get(magic, "<u4")
        sound = magic in _MAGIC and checksum(header[:24], (0, 0), words) == (sum_1, sum_2)
        # A header that is damaged does not say which frames are from before the log was begun anew.
        salts = (salt_1, salt_2) if sound else self._head(1)[2:4]
        committed = self._committed(salts)
        last_sound = self._sound(committed, (sum_1, sum_2), words) if sound else 0
        return committed - last_sound if committed - last_sound > sound else 0

    def _head(self, number: int) -> tuple[int, ...]:
        """Of a frame; they count from 1. The file is then at its page."""
        self._file.seek(_HEADER.size + (number - 1) * self._frame_bytes)
        return _FRAME.unpack(self._file.read(_FRAME.size))

    def _committed(self, salts: tuple[int, ...]) -> int:
        """The last frame that ends a commit; frames from before the log was begun anew have other
        salts."""
        committed = 0
        for number in range(1, self._num_frames + 1):
            head = self._head(number)
            if head[1] and head[2:4] == salts:
                committed = number
        return committed

    def _sound(self, last: int, sums: Sums, words: str) -> int:
        """The frames up to `last` that have the right checksums, from the first on."""
        for number in range(1, last + 1):
            head = self._head(number)
            content = _FRAME.pack(*head)[:_SUMMED_BYTES] + self._file.read(self._page_bytes)
            sums = checksum(content, sums, words)
            if sums != head[4:6]:
                return number - 1
        return last


def checksum(content: bytes, start: Sums, words: str) -> Sums:
    """`start` continued with pairs of words (x, y): s += x + t, then t += y + s, modulo 2^32. All
    at once: it is linear, with a weight for each word."""
    weights = _weights(len(content) // 8)
    values = np.frombuffer(content, words).astype(np.uint64)
    s, t = np.array(start, np.uint64) @ weights[:2] + values @ weights[2:]
    return int(s) % 2**32, int(t) % 2**32


@cache
def _weights(num_pairs: int) -> npt.NDArray[np.uint64]:
    """`[2 + 2 * num_pairs, 2]`: of s, t and each word in the two sums. They are kept modulo 2^32,
    products of them and words wrap modulo 2^64, which leaves that."""
    rows = [(1, 0), (0, 1)]
    pairs: list[tuple[int, int]] = []
    # A pair (x, y) makes of (s, t): (s + t + x, s + 2 t + x + y).
    first, second = (1, 1), (0, 1)
    for _ in range(num_pairs):
        pairs += [second, first]
        first, second = _continued(first), _continued(second)
        rows = [_continued(row) for row in rows]
    return np.array([*rows, *reversed(pairs)], np.uint64)


def _continued(weights: tuple[int, int]) -> tuple[int, int]:
    """After one more pair."""
    s, t = weights
    return (s + t) % 2**32, (s + 2 * t) % 2**32
