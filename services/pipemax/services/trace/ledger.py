"""Whether the spans of a stage are all there, and what they add up to. Pure."""

from dataclasses import dataclass, field

from pipemax.proto.messages.spans import StageSpans, unpack_i64
from pipemax.proto.states import STATES


@dataclass(slots=True)
class StageLedger:
    """One stage over the time of a recording; nanoseconds."""

    spans_ns: list[int] = field(default_factory=lambda: [0] * len(STATES))
    """By state, sum of the spans."""
    counted_ns: list[int] = field(default_factory=lambda: [0] * len(STATES))
    """By state, what the stage's counters grew by meanwhile."""
    missing_ns: int = 0
    """Between spans: left out by the stage, or lost on the way."""
    num_spans: int = 0
    restarts: int = 0
    _pid: int | None = None
    _end_ns: int = 0
    _total_ns: tuple[int, ...] = ()

    def add(self, report: StageSpans) -> None:
        """The next one."""
        lengths_ns = unpack_i64(report.lengths_ns)
        own_ns = [0] * len(STATES)
        for code, length_ns in zip(report.states, lengths_ns, strict=True):
            own_ns[code] += length_ns
        before = self._total_ns
        if report.pid != self._pid:
            self.restarts += self._pid is not None
            before = tuple(t - s for t, s in zip(report.total_ns, own_ns, strict=True))
        if self._pid is not None:
            self.missing_ns += max(0, report.begin_ns - self._end_ns)
        self._pid, self._total_ns = report.pid, report.total_ns
        self._end_ns = report.begin_ns + sum(lengths_ns)
        self.num_spans += len(lengths_ns)
        for index, spent_ns in enumerate(own_ns):
            self.spans_ns[index] += spent_ns
            self.counted_ns[index] += report.total_ns[index] - before[index]

    @property
    def is_complete(self) -> bool:
        """Spans add up to what the counters grew by, to the nanosecond."""
        return self.spans_ns == self.counted_ns

    def share(self, state: int) -> float:
        return self.spans_ns[state] / max(1, sum(self.spans_ns))
