"""Prometheus metrics: names follow vLLM's stems with the prefix `pipemax_`.

Counters and gauges are read from the last Status snapshot when Prometheus scrapes, so that the
scheduling loop pays nothing for them; only the latency histograms are fed as requests finish.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import get_args

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from pipemax.coordinator.jobs import JobTotals
from pipemax.proto.messages.ingest import Finished, JobState, Status

_LATENCY_BUCKETS_S = (0.01, 0.05, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)
_ERROR_BUCKETS = (0.01, 0.02, 0.05, 0.08, 0.1, 0.15, 0.2, 0.3, 0.5, 1)
_TOKEN_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)

_GAUGES: tuple[tuple[str, str, Callable[[Status], float]], ...] = (
    ("num_requests_running", "Requests admitted and not finished.", lambda s: s.requests_running),
    ("num_requests_waiting", "Requests accepted and not admitted.", lambda s: s.requests_waiting),
    (
        "kv_cache_usage_perc",
        "Used share of the device KV pool, 0 to 1.",
        lambda s: s.device_blocks_used / max(1, s.device_blocks_total),
    ),
    (
        "kv_host_cache_usage_perc",
        "Used share of the host KV pool, 0 to 1.",
        lambda s: s.host_blocks_used / max(1, s.host_blocks_total),
    ),
    ("epoch", "Resets so far; the first is the start.", lambda s: s.epoch),
)
_COUNTERS: tuple[tuple[str, str, Callable[[Status], float]], ...] = (
    ("prompt_tokens", "Prompt tokens computed, each once.", lambda s: s.prompt_tokens),
    ("generation_tokens", "Output tokens sampled.", lambda s: s.generation_tokens),
    ("num_preemptions", "Requests sent back to be recomputed.", lambda s: s.preemptions),
    ("recomputed_tokens", "Tokens computed again after a preemption or a crash.",
     lambda s: s.recomputed_tokens),
    ("context_tokens", "Context tokens read by all steps.", lambda s: s.context_tokens),
    ("prefetched_tokens", "Context tokens that came from the host for the step reading them.",
     lambda s: s.prefetched_tokens),
    ("prefetch_budget_blocks",
     "KV blocks that the ordered prefetches could have brought within the link's budget.",
     lambda s: s.prefetch_budget_blocks),
    ("prefetch_blocks", "KV blocks that prefetches were ordered for.",
     lambda s: s.prefetch_blocks),
    ("late_prefetches", "Times that a stage waited for a step's prefetch.",
     lambda s: s.late_prefetches),
    ("kv_offload_load_bytes", "KV bytes moved from host to device.", lambda s: s.load_bytes),
    ("kv_offload_store_bytes", "KV bytes moved from device to host.", lambda s: s.store_bytes),
    ("kv_offload_load_seconds", "Time with a host-to-device copy under way, all links.",
     lambda s: s.load_seconds),
    ("kv_offload_store_seconds", "Time with a device-to-host copy under way, all links.",
     lambda s: s.store_seconds),
)  # fmt: skip


class StatusCollector(Collector):
    """Reads `snapshot()` at scrape time."""

    def __init__(self, snapshot: Callable[[], Status | None]) -> None:
        self._snapshot = snapshot
        self.finished: Counter[str] = Counter()
        """Requests finished, by reason."""
        self.undelivered = 0
        self.jobs = JobTotals()
        """Replaced, never changed."""

    def collect(self) -> Iterator[Metric]:
        status = self._snapshot()
        if status is None:
            return
        model = [status.model_name]
        for name, text, read in _GAUGES:
            gauge = GaugeMetricFamily(f"pipemax_{name}", text, labels=["model_name"])
            gauge.add_metric(model, read(status))
            yield gauge
        for name, text, read in _COUNTERS:
            counter = CounterMetricFamily(f"pipemax_{name}", text, labels=["model_name"])
            counter.add_metric(model, read(status))
            yield counter
        yield from self._requests(model)
        yield from self._jobs(model)
        yield from self._stages(status)

    def _requests(self, model: list[str]) -> Iterator[Metric]:
        success = CounterMetricFamily(
            "pipemax_request_success",
            "Requests finished, by reason.",
            labels=["model_name", "finished_reason"],
        )
        for reason in ("stop", "length", "abort"):
            success.add_metric([*model, reason], self.finished[reason])
        yield success
        lost = CounterMetricFamily(
            "pipemax_results_undelivered",
            "Results whose client was gone.",
            labels=["model_name"],
        )
        lost.add_metric(model, self.undelivered)
        yield lost

    def _jobs(self, model: list[str]) -> Iterator[Metric]:
        totals = self.jobs
        jobs = GaugeMetricFamily(
            "pipemax_jobs", "Durable jobs, by state.", labels=["model_name", "state"]
        )
        for state in get_args(JobState):
            jobs.add_metric([*model, state], totals.jobs[state])
        yield jobs
        for name, text, value in (
            (
                "job_requests_pending",
                "Requests of durable jobs that have no result yet.",
                totals.requests_pending,
            ),
            (
                "job_requests_finished",
                "Results in the journal, errors among them.",
                totals.requests_finished,
            ),
            ("journal_bytes", "What durable jobs take on the disk.", totals.journal_bytes),
        ):
            gauge = GaugeMetricFamily(f"pipemax_{name}", text, labels=["model_name"])
            gauge.add_metric(model, value)
            yield gauge

    def _stages(self, status: Status) -> Iterator[Metric]:
        seconds = CounterMetricFamily(
            "pipemax_stage_seconds",
            "Each stage's wall time by state; all but compute is a bubble.",
            labels=["stage", "state"],
        )
        steps = CounterMetricFamily("pipemax_stage_steps", "Steps computed.", labels=["stage"])
        for stage in status.stages:
            for state, value in stage.state_seconds.items():
                seconds.add_metric([str(stage.stage), state], value)
            steps.add_metric([str(stage.stage)], stage.steps)
        yield seconds
        yield steps


class Metrics:
    """The registry behind /metrics."""

    def __init__(self, model_name: str, snapshot: Callable[[], Status | None]) -> None:
        self.registry = CollectorRegistry()
        self.collector = StatusCollector(snapshot)
        self.registry.register(self.collector)
        self._model_name = model_name
        self._first_token = self._histogram(
            "time_to_first_token_seconds", "Submission to first output token.", _LATENCY_BUCKETS_S
        )
        self._between_tokens = self._histogram(
            "inter_token_latency_seconds", "Mean time between a request's tokens.", _TOKEN_BUCKETS_S
        )
        self._step_error = Histogram(
            "pipemax_step_time_relative_error",
            "Off the measured step time, predicted before it was learned from; as a share of it.",
            ["stage"],
            buckets=_ERROR_BUCKETS,
            registry=self.registry,
        )
        self._total = self._histogram(
            "e2e_request_latency_seconds", "Submission to result.", _LATENCY_BUCKETS_S
        )
        self._queue = self._histogram(
            "request_queue_time_seconds", "Submission to admission.", _LATENCY_BUCKETS_S
        )

    def step_predicted(self, stage: int, relative_error: float) -> None:
        """A stage reported a step whose time had been predicted."""
        self._step_error.labels(str(stage)).observe(relative_error)

    def request_finished(self, result: Finished) -> None:
        self.collector.finished[result.finish_reason] += 1
        self._queue.labels(self._model_name).observe(result.queue_s)
        self._total.labels(self._model_name).observe(result.total_s)
        outputs = len(result.token_ids)
        if outputs:
            self._first_token.labels(self._model_name).observe(result.first_token_s)
        if outputs > 1:
            mean = (result.total_s - result.first_token_s) / (outputs - 1)
            self._between_tokens.labels(self._model_name).observe(mean)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(
            f"pipemax_{name}", text, ["model_name"], buckets=buckets, registry=self.registry
        )
