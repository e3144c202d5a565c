"""Byte sizes as people write them: `64MiB`, `4GiB`, `1.5GB`, `4096`."""

import re

from pipemax.proto.errors import ConfigError

_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
_PATTERN = re.compile(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([a-zA-Z]*)\s*")


def parse_size(text: str) -> int:
    """Bytes meant by `text`. A bare number is bytes; raises ConfigError for anything else."""
    match = _PATTERN.fullmatch(text)
    unit = _UNITS.get(match.group(2).lower()) if match else None
    if match is None or unit is None:
        raise ConfigError(f"{text!r} is not a size; write for example 64MiB, 4GiB or 500000000")
    number = match.group(1)
    return int(float(number) * unit) if "." in number else int(number) * unit


def format_size(size_bytes: float) -> str:
    """`size_bytes` in the largest binary unit that keeps it at or above one."""
    for unit, width in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size_bytes >= width:
            return f"{size_bytes / width:.1f} {unit}"
    return f"{size_bytes:.0f} B"
