"""Reads the header of a safetensors file without torch, and checks the file's length against it.

Format: 8 bytes little-endian header length, a JSON header, then the tensors' bytes.
"""

import json
import struct
from dataclasses import dataclass
from pathlib import Path

from pipemax.proto.errors import ModelError

_MAX_HEADER_BYTES = 100_000_000
"""The format's own limit; also keeps a damaged length from asking for all memory."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """What a header says of one tensor. `dtype` is safetensors' name: F32, BF16, ..."""

    dtype: str
    shape: tuple[int, ...]
    num_bytes: int


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Tensors of a file, by name. Raises ModelError naming the file when it is truncated, has
    trailing bytes, or is not a safetensors file."""
    try:
        with path.open("rb") as file:
            file_bytes = path.stat().st_size
            prefix = file.read(8)
            header_bytes = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if header_bytes > _MAX_HEADER_BYTES:
                raise ModelError(f"{path} is not a safetensors file; download it again")
            if len(prefix) < 8 or 8 + header_bytes > file_bytes:
                raise ModelError(
                    f"{path} is truncated: its {file_bytes} bytes end inside the header; "
                    "download it again"
                )
            header = json.loads(file.read(header_bytes))
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ModelError(f"{path} is not a safetensors file; download it again") from error
    return _entries(path, header, file_bytes - 8 - header_bytes)


def _entries(path: Path, header: object, data_bytes: int) -> dict[str, TensorEntry]:
    entries: dict[str, TensorEntry] = {}
    end = 0
    try:
        if not isinstance(header, dict):
            raise TypeError("header is not a map")
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            first, last = entry["data_offsets"]
            shape = tuple(int(size) for size in entry["shape"])
            entries[name] = TensorEntry(str(entry["dtype"]), shape, int(last) - int(first))
            end = max(end, int(last))
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{path} has a damaged header; download it again") from error
    if end != data_bytes:
        verb = "is truncated" if data_bytes < end else "has trailing bytes"
        raise ModelError(
            f"{path} {verb}: its tensors need {end} bytes and {data_bytes} are there; "
            "download it again"
        )
    return entries
