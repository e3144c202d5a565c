"""Writes `coordinator/METRICS.md` from the registry behind /metrics.

python -m pipemax.coordinator.metrics_document > coordinator/METRICS.md
"""

import sys
from collections.abc import Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric

from pipemax.coordinator.assembly import Assembly, sampler_name, stage_name
from pipemax.coordinator.metrics import Metrics
from pipemax.coordinator.state import SchedulerLimits, SchedulerState
from pipemax.coordinator.status import StatusView
from pipemax.proto.config import EngineConfig
from pipemax.proto.messages.control import KvReport, LinkTotals
from pipemax.proto.messages.ingest import Finished, JobProgress
from pipemax.proto.states import STATES

SAMPLER_STATES = ("sample", "wait")
"""As samplers report them."""
_NUMBERED = ("stage", "slot", "sampler")
_NAMED = ("model_name", "job_name")
_HEAD = """\
# Metrics

What `/metrics` exports, generated from the code by
`python -m pipemax.coordinator.metrics_document > coordinator/METRICS.md`.

Served by the coordinator on `--metrics-host` and `--metrics-port`. Counters start at 0 with each
coordinator and go on when other processes are started again. Dashboards and alerts over them are in
[`ops/`](../ops/README.md).

| metric | type | labels | |
|---|---|---|---|
"""
_TAIL = """
Labels: `model_name` is the name under which the model is served, `stage`, `slot` and `sampler`
count from 0, `job_name` is that of a durable job. A histogram has the series `_bucket` (with `le`),
`_sum` and `_count`.
"""


def render() -> str:
    """The page."""
    rows = [_row(metric) for metric in _metrics(_example())]
    return _HEAD + "".join(sorted(rows)) + _TAIL


def _row(metric: Metric) -> str:
    name = metric.name + ("_total" if metric.type == "counter" else "")
    return f"| `{name}` | {metric.type} | {', '.join(_labels(metric))} | {metric.documentation} |\n"


def _labels(metric: Metric) -> Iterator[str]:
    """Each with its values where these are fixed."""
    values: dict[str, list[str]] = {}
    for sample in metric.samples:
        for label, value in sample.labels.items():
            known = values.setdefault(label, [])
            if label != "le" and value not in known:
                known.append(value)
    for label, known in values.items():
        if label in (*_NUMBERED, *_NAMED):
            yield f"`{label}`"
        elif label != "le":
            yield f"`{label}`: {', '.join(f'`{value}`' for value in known)}"


def _metrics(registry: CollectorRegistry) -> list[Metric]:
    return list(registry.collect())


def _example() -> CollectorRegistry:
    """A registry in which every metric has samples."""
    config = EngineConfig(
        model="m", served_model_name="m", layer_split=(1,), max_model_len=1, sampler_workers=1
    )
    limits = SchedulerLimits(16, 1, 1, 1, 1, frozenset())
    view = StatusView(config, "example", SchedulerState(limits), Assembly(1, 1))
    view.stage_seconds(stage_name(0), dict.fromkeys(STATES, 1.0))
    view.stage_seconds(sampler_name(0), dict.fromkeys(SAMPLER_STATES, 1.0))
    view.kv_report(
        KvReport(
            host_blocks_total=1, host_blocks_used=0, links=(LinkTotals(),), queued_load_bytes=(0,)
        )
    )
    view.jobs = (
        JobProgress(
            name="j", state="running", num_requests=2, num_results=1, num_failed=0, eta_s=1.0
        ),
    )
    view.refresh()
    metrics = Metrics("m", lambda: view.latest)
    metrics.step_predicted(0, 0.0)
    metrics.request_finished(
        Finished(
            request_id="r",
            token_ids=(1, 2),
            text="",
            finish_reason="stop",
            num_prompt_tokens=1,
            queue_s=0.0,
            first_token_s=0.0,
            total_s=0.0,
        )
    )
    return metrics.registry


if __name__ == "__main__":
    sys.stdout.write(render())
