"""Spans in the JSON that chrome://tracing and Perfetto read.

The format is Google's "Trace Event Format": complete events (`ph` X) with `ts` and `dur` in
microseconds, and metadata events (`ph` M) that name processes and threads. Each stage is a process
with three threads: what it did, and its link in both directions.
"""

import json
from dataclasses import dataclass
from typing import Any, TextIO

from pipemax.proto.messages.spans import CopySpans, StageSpans, unpack_i64
from pipemax.proto.states import STATES

_STATE, _LOAD, _STORE = 1, 2, 3
_THREADS = {_STATE: "state", _LOAD: "KV: host to device", _STORE: "KV: device to host"}
_OF_A_STEP = frozenset(STATES) - {"wait_plan"}
"""States whose time is spent on a step that is known."""


@dataclass(frozen=True, slots=True)
class _Span:
    begin_ns: int
    length_ns: int
    code: int
    step: int


class ChromeTrace:
    """Writes events as they come, so that memory does not grow with a recording. Spans that a
    message's end cut in two are joined. `close` ends the file; one that was not closed is refused
    by strict readers."""

    def __init__(self, out: TextIO, num_stages: int, about: dict[str, Any]) -> None:
        """`about`: goes into the file, for people."""
        self._out = out
        self._first = True
        self._zero_ns: int | None = None
        self._open: dict[int, _Span] = {}
        """By stage: may go on in its next report."""
        head = {"displayTimeUnit": "ms", "otherData": about}
        self._out.write(json.dumps(head)[:-1] + ', "traceEvents": [\n')
        for stage in range(num_stages):  # viewers show processes in the order of their names
            self._introduce(stage)

    def add(self, report: StageSpans | CopySpans) -> None:
        if isinstance(report, StageSpans):
            self._add_stage(report)
        else:
            self._add_copies(report)

    def close(self) -> None:
        for stage, span in self._open.items():
            self._state(stage, span)
        self._open.clear()
        self._out.write("\n]}\n")

    def _add_stage(self, report: StageSpans) -> None:
        begin_ns = report.begin_ns
        lengths, steps = unpack_i64(report.lengths_ns), unpack_i64(report.steps)
        before = self._open.pop(report.stage, None)
        for code, length_ns, step in zip(report.states, lengths, steps, strict=True):
            span = _Span(begin_ns, length_ns, code, step)
            begin_ns += length_ns
            if before is not None and _continues(before, span):
                before = _Span(before.begin_ns, before.length_ns + length_ns, code, step)
                continue
            if before is not None:
                self._state(report.stage, before)
            before = span
        if before is not None:
            self._open[report.stage] = before

    def _state(self, stage: int, span: _Span) -> None:
        state = STATES[span.code]
        args = {"step": span.step} if state in _OF_A_STEP and span.step >= 0 else {}
        self._event(stage, _STATE, state, "state", span.begin_ns, span.length_ns, args)

    def _add_copies(self, report: CopySpans) -> None:
        columns = (report.stages, report.begins_ns, report.lengths_ns, report.sizes_bytes)
        for code, stage, begin_ns, length_ns, size in zip(
            report.directions, *map(unpack_i64, columns), strict=True
        ):
            thread = _STORE if code else _LOAD
            name = "store" if code else "load"
            self._event(stage, thread, name, "kv", begin_ns, length_ns, {"bytes": size})

    def _introduce(self, stage: int) -> None:
        self._meta(stage, 0, "process_name", {"name": f"stage {stage}"})
        self._meta(stage, 0, "process_sort_index", {"sort_index": stage})
        for thread, name in _THREADS.items():
            self._meta(stage, thread, "thread_name", {"name": name})
            self._meta(stage, thread, "thread_sort_index", {"sort_index": thread})

    def _meta(self, stage: int, thread: int, name: str, args: dict[str, Any]) -> None:
        self._write({"ph": "M", "pid": stage + 1, "tid": thread, "name": name, "args": args})

    def _event(
        self,
        stage: int,
        thread: int,
        name: str,
        category: str,
        begin_ns: int,
        length_ns: int,
        args: dict[str, Any],
    ) -> None:
        if self._zero_ns is None:
            self._zero_ns = begin_ns
        event = {
            "ph": "X",
            "pid": stage + 1,
            "tid": thread,
            "name": name,
            "cat": category,
            "ts": (begin_ns - self._zero_ns) / 1e3,
            "dur": length_ns / 1e3,
            "args": args,
        }
        self._write(event)

    def _write(self, event: dict[str, Any]) -> None:
        self._out.write(("" if self._first else ",\n") + json.dumps(event))
        self._first = False


def _continues(before: _Span, span: _Span) -> bool:
    same = (before.code, before.step) == (span.code, span.step)
    return same and before.begin_ns + before.length_ns == span.begin_ns
