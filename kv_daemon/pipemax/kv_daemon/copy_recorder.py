"""When copies ran, for whoever watches. Pure.

Copies of one stage in one direction are carried out in the order in which they were started: one
begins when it was started, or when the one before it ended.
"""

from collections import defaultdict, deque

from pipemax.kv_daemon.events import DIRECTIONS, Direction, StartCopy
from pipemax.proto.messages.spans import MAX_SPANS, CopySpans, pack_i64


class CopyRecorder:
    """Follows copies always, which is little; keeps their spans only while recording, and of these
    as many as a message holds."""

    def __init__(self) -> None:
        self.block_bytes: dict[int, int] = {}
        """Of each stage's blocks, on the link."""
        self._under_way: defaultdict[tuple[int, Direction], deque[tuple[int, int]]] = defaultdict(
            deque
        )
        """(started, bytes) of copies that have not ended."""
        self._last_end_ns: dict[tuple[int, Direction], int] = {}
        self._record_until_ns = 0
        self._spans: list[tuple[int, int, int, int, int]] = []

    def record_until(self, moment_ns: int) -> None:
        self._record_until_ns = moment_ns

    def started(self, copy: StartCopy, now_ns: int) -> None:
        size = sum(run.length for run in copy.runs) * self.block_bytes.get(copy.stage, 0)
        self._under_way[copy.stage, copy.direction].append((now_ns, size))

    def ended(self, stage: int, direction: Direction, now_ns: int) -> None:
        lane = (stage, direction)
        started_ns, size = self._under_way[lane].popleft()
        begin_ns = max(started_ns, self._last_end_ns.get(lane, 0))
        self._last_end_ns[lane] = now_ns
        if now_ns < self._record_until_ns and len(self._spans) < MAX_SPANS:
            code = DIRECTIONS.index(direction)
            self._spans.append((stage, code, begin_ns, now_ns - begin_ns, size))

    def take(self) -> CopySpans | None:
        """What was recorded since the last call; None for nothing."""
        if not self._spans:
            return None
        stages, codes, begins, lengths, sizes = zip(*self._spans, strict=True)
        self._spans = []
        return CopySpans(
            stages=pack_i64(stages),
            directions=bytes(codes),
            begins_ns=pack_i64(begins),
            lengths_ns=pack_i64(lengths),
            sizes_bytes=pack_i64(sizes),
        )
