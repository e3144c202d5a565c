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
from pipemax.proto.messages.ingest import Finished, FinishReason, JobState, Status

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
    ("uptime_seconds", "Since the coordinator started.", lambda s: s.uptime_s),
    ("missing_processes", "Processes the system waits for.", lambda s: len(s.missing)),
)
_COUNTERS: tuple[tuple[str, str, Callable[[Status], float]], ...] = (
    ("prompt_tokens", "Prompt tokens computed or shared, each once.", lambda s: s.prompt_tokens),
    ("prefix_cache_queries", "Prompt tokens of requests that might share their first blocks.",
     lambda s: s.prefix_query_tokens),
    ("prefix_cache_hits", "Prompt tokens taken over from another request, not computed.",
     lambda s: s.prefix_hit_tokens),
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
    ("coordinator_busy_seconds", "Time in which the coordinator did not wait for messages.",
     lambda s: s.coordinator_busy_seconds),
)  # fmt: skip
_PHASES = ("starting", "ready", "recovering", "draining")


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
        yield from _phase(status, model)
        yield from _kv_by_tier(status, model)
        yield from self._requests(model)
        yield from self._jobs(model)
        yield from _unfinished_jobs(status)
        yield from _slots(status)
        yield from _stages(status)
        yield from _samplers(status)
        yield from _links(status)

    def _requests(self, model: list[str]) -> Iterator[Metric]:
        success = CounterMetricFamily(
            "pipemax_request_success",
            "Requests finished, by reason.",
            labels=["model_name", "finished_reason"],
        )
        for reason in get_args(FinishReason):
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


def _phase(status: Status, model: list[str]) -> Iterator[Metric]:
    phase = GaugeMetricFamily(
        "pipemax_phase", "1 for the phase the system is in.", labels=["model_name", "phase"]
    )
    for name in _PHASES:
        phase.add_metric([*model, name], float(status.phase == name))
    yield phase


def _kv_by_tier(status: Status, model: list[str]) -> Iterator[Metric]:
    used = GaugeMetricFamily(
        "pipemax_kv_blocks", "KV blocks in use, by tier.", labels=["model_name", "tier"]
    )
    room = GaugeMetricFamily(
        "pipemax_kv_blocks_capacity", "KV blocks there are, by tier.", labels=["model_name", "tier"]
    )
    for tier, in_use, total in (
        ("device", status.device_blocks_used, status.device_blocks_total),
        ("host", status.host_blocks_used, status.host_blocks_total),
    ):
        used.add_metric([*model, tier], in_use)
        room.add_metric([*model, tier], total)
    yield used
    yield room


def _unfinished_jobs(status: Status) -> Iterator[Metric]:
    """One series a job, for as long as it is unfinished."""
    sizes = GaugeMetricFamily(
        "pipemax_job_size_requests", "Requests of an unfinished job.", labels=["job_name"]
    )
    results = GaugeMetricFamily(
        "pipemax_job_results", "Results of an unfinished job, errors among them.",
        labels=["job_name"],
    )  # fmt: skip
    failed = GaugeMetricFamily(
        "pipemax_job_failed_results", "Errors among the results of an unfinished job.",
        labels=["job_name"],
    )  # fmt: skip
    eta = GaugeMetricFamily(
        "pipemax_job_eta_seconds",
        "Until an unfinished job's last result, if they go on coming as of late.",
        labels=["job_name"],
    )
    for job in status.jobs:
        sizes.add_metric([job.name], job.num_requests)
        results.add_metric([job.name], job.num_results)
        failed.add_metric([job.name], job.num_failed)
        if job.eta_s is not None:
            eta.add_metric([job.name], job.eta_s)
    yield from (sizes, results, failed, eta)


def _slots(status: Status) -> Iterator[Metric]:
    requests = GaugeMetricFamily(
        "pipemax_slot_requests", "Requests in a slot's step in flight.", labels=["slot"]
    )
    context = GaugeMetricFamily(
        "pipemax_slot_context_tokens",
        "Tokens whose KV the decode requests of a slot's step read.",
        labels=["slot"],
    )
    prefill = GaugeMetricFamily(
        "pipemax_slot_prefill_tokens", "Prompt tokens in a slot's step.", labels=["slot"]
    )
    for index, slot in enumerate(status.slots):
        requests.add_metric([str(index)], slot.requests)
        context.add_metric([str(index)], slot.context_tokens)
        prefill.add_metric([str(index)], slot.prefill_tokens)
    yield from (requests, context, prefill)


def _stages(status: Status) -> Iterator[Metric]:
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
    yield from (seconds, steps)


def _samplers(status: Status) -> Iterator[Metric]:
    seconds = CounterMetricFamily(
        "pipemax_sampler_seconds",
        "Each sampler worker's wall time by state.",
        labels=["sampler", "state"],
    )
    rows = CounterMetricFamily(
        "pipemax_sampler_rows", "Rows of logits sampled by sampler workers.", labels=["sampler"]
    )
    for sampler in status.samplers:
        for state, value in sampler.state_seconds.items():
            seconds.add_metric([str(sampler.sampler), state], value)
        rows.add_metric([str(sampler.sampler)], sampler.rows)
    yield from (seconds, rows)


def _links(status: Status) -> Iterator[Metric]:
    labels = ["stage", "direction"]
    moved = CounterMetricFamily(
        "pipemax_link_bytes", "KV bytes a stage's link carried.", labels=labels
    )
    busy = CounterMetricFamily(
        "pipemax_link_busy_seconds", "Time with a copy under way on a stage's link.", labels=labels
    )
    copies = CounterMetricFamily(
        "pipemax_link_copies", "Copies on a stage's link, merged ones once.", labels=labels
    )
    queued = GaugeMetricFamily(
        "pipemax_link_queued_load_bytes", "Prefetches ordered and not yet copied.", labels=["stage"]
    )
    planned = GaugeMetricFamily(
        "pipemax_link_bandwidth_bytes_per_second",
        "Host to device, measured under load: what prefetches are planned with. 0 until measured.",
        labels=["stage"],
    )
    for stage in status.stages:
        name, link = str(stage.stage), stage.link
        for direction, num_bytes, seconds, count in (
            ("load", link.load_bytes, link.load_seconds, link.load_copies),
            ("store", link.store_bytes, link.store_seconds, link.store_copies),
        ):
            moved.add_metric([name, direction], num_bytes)
            busy.add_metric([name, direction], seconds)
            copies.add_metric([name, direction], count)
        queued.add_metric([name], stage.queued_load_bytes)
        planned.add_metric([name], stage.link_bandwidth_bytes_s)
    yield from (moved, busy, copies, queued, planned)


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
        self._step_error_of: dict[int, Histogram] = {}
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
        child = self._step_error_of.get(stage)
        if child is None:
            child = self._step_error_of[stage] = self._step_error.labels(str(stage))
        child.observe(relative_error)

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
