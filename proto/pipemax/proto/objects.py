"""How many objects a MessagePack frame would become, without making them.

An empty list is one byte on the wire and sixty in memory: a message of 16 MiB that holds nothing
else is a gigabyte as objects. The format can be read byte by byte, and runs of numbers at once.
Format: https://github.com/msgpack/msgpack/blob/master/spec.md
"""

import re
from collections.abc import Callable
from typing import Final

_NUMBERS: Final = re.compile(
    rb"(?:[\x00-\x7f\xc0-\xc3\xe0-\xff]|[\xcc\xd0].|[\xcd\xd1].{2}|[\xca\xce\xd2].{4}"
    rb"|[\xcb\xcf\xd3].{8})+",
    re.DOTALL,
)
"""Also nil, false and true. Objects of a few bytes, of which many are the same ones."""
_HEADERS: Final[dict[int, tuple[int, Callable[[int], int]]]] = {
    **{byte: (0, lambda _: 0) for byte in range(0x80, 0xA0)},  # fixmap, fixarray
    **dict.fromkeys((0xDC, 0xDE), (2, lambda _: 0)),  # array 16, map 16
    **dict.fromkeys((0xDD, 0xDF), (4, lambda _: 0)),  # array 32, map 32
    **dict.fromkeys((0xC4, 0xD9), (1, lambda size: size)),  # bin 8, str 8
    **dict.fromkeys((0xC5, 0xDA), (2, lambda size: size)),
    **dict.fromkeys((0xC6, 0xDB), (4, lambda size: size)),
    0xC7: (1, lambda size: size + 1),  # ext 8
    0xC8: (2, lambda size: size + 1),
    0xC9: (4, lambda size: size + 1),
    0xD4: (0, lambda _: 2),  # fixext 1
    0xD5: (0, lambda _: 3),
    0xD6: (0, lambda _: 5),
    0xD7: (0, lambda _: 9),
    0xD8: (0, lambda _: 17),
}
"""By first byte: how many bytes behind it hold a size, and the bytes of content for that size."""


def count_objects(frame: bytes | memoryview, most: int) -> int:
    """Lists, maps, texts and byte strings in `frame`; stops at `most` + 1. What is no MessagePack
    is counted up to where that shows, or as something else."""
    at, end, found = 0, len(frame), 0
    while at < end and found <= most:
        first = frame[at]
        if 0xA0 <= first < 0xC0:  # fixstr
            at += 1 + (first & 0x1F)
            found += 1
        elif (header := _HEADERS.get(first)) is not None:
            size_bytes, content = header
            size = int.from_bytes(frame[at + 1 : at + 1 + size_bytes], "big")
            at += 1 + size_bytes + content(size)
            found += 1
        else:
            match = _NUMBERS.match(frame, at)
            if match is None:
                break
            at = match.end()
    return found
