"""Traces: the format, joined spans, and what is told to be missing."""

import io
import json
from typing import Any

from pipemax.proto.messages.spans import CopySpans, StageSpans, pack_i64
from pipemax.proto.states import STATES
from pipemax.services.trace.chrome import ChromeTrace
from pipemax.services.trace.ledger import StageLedger

T0 = 5 * 10**15 + 123


def report(begin_ns: int, *spans: tuple[str, int, int], pid: int = 7, before: Any = ()) -> Any:
    """`spans`: (state, step, nanoseconds); `before`: counters before them."""
    total = dict.fromkeys(STATES, 1000) | dict(before)
    for state, _, length in spans:
        total[state] += length
    return StageSpans(
        stage=1,
        pid=pid,
        begin_ns=begin_ns,
        states=bytes(STATES.index(state) for state, _, _ in spans),
        lengths_ns=pack_i64(length for _, _, length in spans),
        steps=pack_i64(step for _, step, _ in spans),
        total_ns=tuple(total[state] for state in STATES),
    )


def events_of(*reports: StageSpans | CopySpans) -> list[dict[str, Any]]:
    out = io.StringIO()
    trace = ChromeTrace(out, 2, {"model": 'a "name"'})
    for one in reports:
        trace.add(one)
    trace.close()
    found = json.loads(out.getvalue())
    assert found["otherData"] == {"model": 'a "name"'}
    return found["traceEvents"]


def complete(events: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [
        (e["name"], e["pid"], e["tid"], e["ts"], e["dur"], e["args"])
        for e in events
        if e["ph"] == "X"
    ]


def test_spans_are_complete_events_in_microseconds_joined_across_reports() -> None:
    events = events_of(
        report(T0, ("prepare", 4, 1500), ("compute", 4, 10_001)),
        report(T0 + 11_501, ("compute", 4, 99), ("wait_plan", 4, 7)),
    )
    assert complete(events) == [
        ("prepare", 2, 1, 0.0, 1.5, {"step": 4}),
        ("compute", 2, 1, 1.5, 10.1, {"step": 4}),
        ("wait_plan", 2, 1, 11.6, 0.007, {}),
    ]


def test_spans_with_a_gap_between_them_are_not_joined() -> None:
    events = events_of(report(T0, ("send", 4, 10)), report(T0 + 11, ("send", 4, 10)))
    assert [span[3:5] for span in complete(events)] == [(0.0, 0.01), (0.011, 0.01)]


def test_copies_have_threads_of_their_own_and_threads_have_names() -> None:
    copies = CopySpans(
        stages=pack_i64([0, 0]),
        directions=b"\0\1",
        begins_ns=pack_i64([T0, T0 + 5]),
        lengths_ns=pack_i64([1000, 2000]),
        sizes_bytes=pack_i64([4096, 2**33]),
    )
    events = events_of(copies)
    assert complete(events) == [
        ("load", 1, 2, 0.0, 1.0, {"bytes": 4096}),
        ("store", 1, 3, 0.005, 2.0, {"bytes": 2**33}),
    ]
    processes = [e["args"]["name"] for e in events if e["name"] == "process_name"]
    assert processes == ["stage 0", "stage 1"]
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert names == {1: "state", 2: "KV: host to device", 3: "KV: device to host"}


def test_an_empty_trace_is_valid_too() -> None:
    assert complete(events_of()) == []


def test_spans_add_up_or_what_is_missing_is_told() -> None:
    ledger = StageLedger()
    ledger.add(report(T0, ("compute", 1, 500), ("send", 1, 20)))
    ledger.add(report(T0 + 520, ("compute", 2, 80), before={"compute": 1500, "send": 1020}))
    assert ledger.is_complete
    assert (ledger.missing_ns, ledger.num_spans) == (0, 3)
    assert ledger.share(STATES.index("compute")) == 580 / 600
    # A message of 30 ns was lost: counters grew by more than spans say.
    ledger.add(report(T0 + 630, ("compute", 3, 1), before={"compute": 1610, "send": 1020}))
    assert not ledger.is_complete
    assert ledger.missing_ns == 30


def test_a_restarted_stage_counts_from_anew() -> None:
    ledger = StageLedger()
    ledger.add(report(T0, ("compute", 1, 500)))
    ledger.add(report(T0 + 900, ("compute", 2, 80), pid=8, before={"compute": 3}))
    assert ledger.is_complete
    assert (ledger.restarts, ledger.missing_ns) == (1, 400)
