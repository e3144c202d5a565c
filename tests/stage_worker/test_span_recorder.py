"""Spans tile the time and add up to the counters, whatever the clock goes through."""

from hypothesis import given
from hypothesis import strategies as st

from pipemax.proto.messages.spans import unpack_i64
from pipemax.proto.states import STATES
from pipemax.stage_worker.span_recorder import SpanRecorder
from pipemax.stage_worker.span_report import SpanReport
from pipemax.stage_worker.state_clock import StateClock


class Time:
    def __init__(self) -> None:
        self.ns = 10**12

    def __call__(self) -> int:
        return self.ns

    def seconds(self) -> float:
        return self.ns / 1e9


moves = st.lists(
    st.tuples(
        st.integers(0, 10**10),  # nanoseconds that pass
        st.sampled_from(("switch", "take_off", "settle", "land", "report")),
        st.sampled_from(STATES),
        st.integers(-1, 5),
    ),
    max_size=40,
)


@given(moves)
def test_reports_follow_each_other_and_add_up_to_the_counters(moves: list[tuple]) -> None:
    time = Time()
    clock = StateClock(time)
    report = SpanReport(3, clock, time.seconds)
    time.ns += 5
    report.record(1e9)
    _, before = clock.cut()
    spent, end_ns = dict.fromkeys(STATES, 0), None
    for passed, what, state, step in [*moves, (7, "report", "send", 0)]:
        time.ns += passed
        if what == "switch":
            clock.switch(state)
        elif what == "take_off":
            clock.take_off()
        elif what in ("settle", "land") and clock.in_flight:
            clock.settle([(state, passed / 2e9)], landed=what == "land")
        elif what == "report":
            spans = report.take()
            assert spans is not None
            assert spans.stage == 3
            assert end_ns is None or spans.begin_ns == end_ns
            lengths = unpack_i64(spans.lengths_ns)
            end_ns = spans.begin_ns + sum(lengths)
            assert clock.in_flight or end_ns == time.ns
            assert len(spans.states) == len(lengths) == len(unpack_i64(spans.steps))
            assert all(length > 0 for length in lengths)
            for code, length in zip(spans.states, lengths, strict=True):
                spent[STATES[code]] += length
            counted = dict(zip(STATES, spans.total_ns, strict=True))
            assert counted == {s: before[s] + spent[s] for s in STATES}
        clock.step = step


def test_a_stage_that_nobody_watches_records_nothing() -> None:
    time = Time()
    clock = StateClock(time)
    report = SpanReport(0, clock, time.seconds)
    assert report.take() is None
    report.record(2.0)
    recorder = clock.recorder
    time.ns += 10**9
    assert report.take() is not None
    report.record(2.0)
    assert clock.recorder is recorder  # the lease is renewed, nothing begins anew
    time.ns += 3 * 10**9
    assert report.take() is not None  # what was recorded until then
    assert clock.recorder is None
    assert report.take() is None


def test_neighbours_of_a_state_and_a_step_are_one_span() -> None:
    recorder = SpanRecorder(100)
    for state, step, length in (("compute", 1, 5), ("compute", 1, 6), ("compute", 2, 7)):
        recorder.add(state, step, length)  # type: ignore[arg-type]
    recorder.add("send", 2, 0)
    begin_ns, states, lengths, steps = recorder.take()
    assert (begin_ns, states, list(lengths), list(steps)) == (100, b"\0\0", [11, 7], [1, 2])
    assert recorder.take()[:2] == (118, b"")


def test_what_is_too_much_is_left_out_at_the_end_and_leaves_a_gap() -> None:
    recorder = SpanRecorder(0, most=2)
    for step in range(5):
        recorder.add("compute", step, 10)
    recorder.add("compute", 1, 10)
    begin_ns, _, lengths, _ = recorder.take()
    assert (begin_ns, list(lengths)) == (0, [10, 10])
    recorder.add("compute", 9, 10)
    begin_ns, _, lengths, _ = recorder.take()
    assert (begin_ns, list(lengths)) == (60, [10])
