"""Asks a running system for its spans."""

import time
from collections.abc import Iterator

from pipemax.client.connection import Connection
from pipemax.proto.errors import NotRunningError, RequestError
from pipemax.proto.messages.ingest import Refused
from pipemax.proto.messages.spans import CopySpans, StageSpans, WatchedSpans, WatchSpans, unpack_i64
from pipemax.services.where import Where

PATIENCE_S = 5.0
"""Beyond the time asked for: until the last reports are here, and for the first ones of a system
that has other things to do."""
_TIMEOUT_S = 30.0


def end_of(spans: StageSpans) -> int:
    """When its last span ended."""
    return spans.begin_ns + sum(unpack_i64(spans.lengths_ns))


def collect(where: Where, num_stages: int, seconds: float) -> Iterator[StageSpans | CopySpans]:
    """What was recorded in `seconds` from the first report on, as it comes. Of stages that say
    nothing there is nothing.

    Raises NotRunningError when there is no system or no stage says anything, RequestError when too
    many record already.
    """
    connection = Connection(where.name, where.endpoint, where.keys, _TIMEOUT_S, "trace")
    try:
        connection.open()
        connection.send(WatchSpans(seconds=seconds + PATIENCE_S))
        yield from _until(connection, num_stages, seconds)
    finally:
        connection.terminate()


def _until(
    connection: Connection, num_stages: int, seconds: float
) -> Iterator[StageSpans | CopySpans]:
    give_up_at_s = time.monotonic() + seconds + PATIENCE_S
    end_ns: int | None = None
    waiting = set(range(num_stages))
    while waiting and (left_s := give_up_at_s - time.monotonic()) > 0:
        message = connection.receive(left_s)
        if isinstance(message, Refused):
            raise RequestError(message.code, message.message)
        if not isinstance(message, WatchedSpans):
            continue
        spans = message.spans
        if isinstance(spans, StageSpans):
            if end_ns is None:
                end_ns = spans.begin_ns + round(seconds * 1e9)
            if spans.stage not in waiting:
                continue
            if end_of(spans) >= end_ns:
                waiting.discard(spans.stage)
        yield spans
    if end_ns is None:
        raise NotRunningError("no stage has said anything; see `pipemax status`")
