"""Where time goes, span by span, for whoever watches (sockets `control` and `ingest`).

Times are nanoseconds of the machine's monotonic clock, which its processes have in common.
"""

from array import array
from collections.abc import Iterable
from typing import Annotated

from msgspec import Meta

from pipemax.proto.messages.types import (
    Count,
    Message,
    Seconds,
    StageIndex,
    pack_column,
    unpack_column,
)

MAX_SPANS = 16384
"""Of one message. A process that has more before the next message is due leaves them out."""
I64 = Annotated[bytes, Meta(max_length=8 * MAX_SPANS)]
"""A column of little-endian 64-bit integers."""
Codes = Annotated[bytes, Meta(max_length=MAX_SPANS)]
"""A column of bytes, each an index."""


class RecordSpans(Message, frozen=True, kw_only=True, tag="record_spans"):
    """Report spans, at least once a second, for `seconds` from now. Said again, that counts."""

    seconds: Seconds


class WatchSpans(Message, frozen=True, kw_only=True, tag="watch_spans"):
    """From a client: pass on to me what stages and daemon report, for `seconds` from now."""

    seconds: Annotated[float, Meta(ge=0, le=86400)]


class StageSpans(Message, frozen=True, kw_only=True, tag="stage_spans"):
    """Where a stage's time went. Each span begins where the one before it ended. The first begins
    where the message before it ended, unless spans were left out, or the message was lost."""

    stage: StageIndex
    pid: Count
    begin_ns: Count
    states: Codes
    """[spans] index into `compute, wait_plan, wait_activation, wait_kv, prepare, send`."""
    lengths_ns: I64
    """[spans]"""
    steps: I64
    """[spans] the step it was spent on, or before; -1 before the first."""
    total_ns: tuple[Count, ...]
    """[states] what the stage's counters are at the end of the last span: they grow by what spans
    say, exactly."""


class CopySpans(Message, frozen=True, kw_only=True, tag="copy_spans"):
    """Copies that ended, in the order in which they did. Copies of one stage in one direction
    follow each other; the daemon learns of an end a little late."""

    stages: I64
    """[copies]"""
    directions: Codes
    """[copies] 0: host to device, 1: device to host."""
    begins_ns: I64
    """[copies]"""
    lengths_ns: I64
    """[copies]"""
    sizes_bytes: I64
    """[copies]"""


class WatchedSpans(Message, frozen=True, kw_only=True, tag="watched_spans"):
    """To a client that watches: one report. One that cannot be taken at once is lost, which shows
    in the times of the next."""

    spans: StageSpans | CopySpans


def pack_i64(values: Iterable[int]) -> I64:
    return pack_column("q", values)


def unpack_i64(column: I64) -> "array[int]":
    """Raises ValueError when the column's length is not a multiple of eight bytes."""
    return unpack_column("q", column)
