"""`pipemax trace` of a running system: its spans are a stage's time, and add up to its counters."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from pipemax.proto.messages.ingest import Status
from pipemax.proto.states import STATES
from pipemax.services.trace.command import record, summary
from pipemax.services.where import Where
from support.command import eventually
from support.monitored_system import busy_system

SECONDS = 1.5


def spans_of(path: Path) -> list[dict[str, Any]]:
    return [e for e in json.loads(path.read_text())["traceEvents"] if e["ph"] == "X"]


def test_a_trace_adds_up(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    with busy_system() as system, system.client() as client:
        before = client.status()
        found = record(Where(system.config.name), SECONDS, path)
        after = client.status()
        # Afterwards nobody records any more.
        assert eventually(lambda: client.status().uptime_s > after.uptime_s + 0.1, 10)
    spans = spans_of(path)
    for stage in range(2):
        ledger = found.stages[stage]
        assert ledger.is_complete
        assert ledger.missing_ns == 0
        assert sum(ledger.spans_ns) >= SECONDS * 1e9
        check_stage(stage, spans, ledger.spans_ns)
        check_counters(stage, before, after, ledger.counted_ns)
    copies = [span for span in spans if span["cat"] == "kv"]
    assert len(copies) == found.num_copies > 0
    assert sum(span["args"]["bytes"] for span in copies) == found.copied_bytes
    grown = after.load_bytes + after.store_bytes - before.load_bytes - before.store_bytes
    assert 0 < found.copied_bytes <= grown + max(span["args"]["bytes"] for span in copies) * 8
    assert not list(tmp_path.glob("*.part"))
    assert summary(found).row_count == 2


def check_stage(stage: int, spans: list[dict[str, Any]], spent_ns: list[int]) -> None:
    """Events follow each other without gap or overlap, and sum to what the ledger has."""
    mine = [s for s in spans if s["pid"] == stage + 1 and s["cat"] == "state"]
    by_state: defaultdict[str, float] = defaultdict(float)
    end = mine[0]["ts"]
    for span in mine:
        assert span["ts"] == pytest.approx(end, abs=0.002)  # microseconds: rounded to nanoseconds
        end = span["ts"] + span["dur"]
        by_state[span["name"]] += span["dur"]
    for state, expected_ns in zip(STATES, spent_ns, strict=True):
        assert by_state[state] == pytest.approx(expected_ns / 1e3, abs=1.0)
    steps = [span["args"]["step"] for span in mine if span["name"] == "compute"]
    assert len(steps) > 5
    assert steps == sorted(set(steps)), "each step is one span of compute"


def check_counters(stage: int, before: Status, after: Status, counted_ns: list[int]) -> None:
    """What the recording counted lies within what /metrics and `status` say of the time around."""
    for state, grown_ns in zip(STATES, counted_ns, strict=True):
        around = (
            after.stages[stage].state_seconds[state] - before.stages[stage].state_seconds[state]
        )
        # Reports to `status` are up to a tick old at either end.
        assert grown_ns / 1e9 <= around + 1.0


def test_nothing_is_written_where_there_is_no_system(tmp_path: Path) -> None:
    from pipemax.proto.errors import NotRunningError

    with pytest.raises(NotRunningError):
        record(Where("none"), 1.0, tmp_path / "trace.json")
    assert list(tmp_path.iterdir()) == []
