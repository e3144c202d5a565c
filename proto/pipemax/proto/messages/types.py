"""Field types shared by the messages, and the packing of integer columns."""

import sys
from array import array
from collections.abc import Iterable
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

I32 = bytes
"""A column of little-endian 32-bit integers. Plans carry columns, not lists of objects: a step of
256 requests is then a few buffers that NumPy reads without copying."""

F32 = bytes
"""A column of little-endian 32-bit floating point numbers."""

RequestKey = Annotated[int, Meta(ge=0, le=2**62)]
"""The coordinator's number for a request, unique within one coordinator's life."""
StepId = Annotated[int, Meta(ge=0, le=2**62)]
Epoch = Annotated[int, Meta(ge=0, le=2**62)]
"""Counts resets. A message of an older epoch is void: its step never happened."""
StageIndex = Annotated[int, Meta(ge=0, lt=1024)]
Count = Annotated[int, Meta(ge=0, le=2**62)]
Seconds = Annotated[float, Meta(ge=0.0)]
MeasuredSeconds = Annotated[float, Meta(gt=0.0, le=1e6)]
"""Of something that happened: more than nothing, and neither infinite nor NaN."""
ShortText = Annotated[str, Meta(max_length=256)]
ErrorText = Annotated[str, Meta(max_length=4096)]
JobName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z")]
JobState = Literal["open", "running", "finished", "cancelled", "held"]


class Message(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type"
):
    """Base of all messages. Subclasses give their own `tag`."""


def pack_i32(values: Iterable[int]) -> I32:
    return pack_column("i", values)


def pack_f32(values: Iterable[float]) -> F32:
    return pack_column("f", values)


def unpack_i32(column: I32) -> "array[int]":
    """Raises ValueError when the column's length is not a multiple of four bytes."""
    return unpack_column("i", column)


def unpack_f32(column: F32) -> "array[float]":
    """Raises ValueError when the column's length is not a multiple of four bytes."""
    return unpack_column("f", column)


def pack_column(typecode: str, values: Iterable[float]) -> bytes:
    """Little-endian, whatever the machine is. `typecode`: the array module's."""
    column = array(typecode, values)
    if sys.byteorder != "little":  # pragma: no cover
        column.byteswap()
    return column.tobytes()


def unpack_column(typecode: str, column: bytes) -> "array[Any]":
    """The other way round. Raises ValueError when the length is no multiple of an item's."""
    values: array[Any] = array(typecode)
    values.frombytes(column)
    if sys.byteorder != "little":  # pragma: no cover
        values.byteswap()
    return values
