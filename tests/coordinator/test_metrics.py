"""/metrics as Prometheus reads it."""

from collections import Counter

import pytest
from prometheus_client import generate_latest

from pipemax.coordinator.assembly import Assembly
from pipemax.coordinator.jobs import JobTotals
from pipemax.coordinator.metrics import Metrics
from pipemax.coordinator.state import SchedulerLimits, SchedulerState
from pipemax.coordinator.status import StatusView
from pipemax.proto.config import EngineConfig
from pipemax.proto.messages.control import KvReport, LinkTotals
from pipemax.proto.messages.ingest import Finished, FinishReason, JobProgress
from support.promtool import check_metrics

STATES = ("compute", "wait_plan", "wait_activation", "wait_kv", "prepare", "send")


@pytest.fixture
def view() -> StatusView:
    config = EngineConfig(
        model="m",
        served_model_name="tiny",
        layer_split=(1, 1),
        pipeline_parallel_size=2,
        max_model_len=64,
    )
    limits = SchedulerLimits(16, 2, 8, 64, 64, frozenset())
    return StatusView(config, "i", SchedulerState(limits), Assembly(2))


def report(load_bytes: int, load_seconds: float) -> KvReport:
    links = tuple(LinkTotals(load_bytes=load_bytes, load_seconds=load_seconds) for _ in range(2))
    return KvReport(host_blocks_total=9, host_blocks_used=1, links=links, queued_load_bytes=(0, 7))


def exposition(view: StatusView, *finished: Finished) -> str:
    metrics = Metrics("tiny", lambda: view.latest)
    for one in finished:
        metrics.request_finished(one)
    return generate_latest(metrics.registry).decode()


def result(finish_reason: FinishReason = "stop") -> Finished:
    return Finished(
        request_id="x",
        token_ids=(1, 2, 3),
        text="",
        finish_reason=finish_reason,
        num_prompt_tokens=3,
        queue_s=0.1,
        first_token_s=0.2,
        total_s=0.4,
    )


def test_promtool_accepts_it(view: StatusView) -> None:
    view.stage_step(0, dict.fromkeys(STATES, 1.0))
    view.stage_step(1, dict.fromkeys(STATES, 2.0))
    view.kv_report(report(1000, 0.5))
    view.refresh()
    text = exposition(view, result(), result(finish_reason="length"))
    check_metrics(text)
    assert 'pipemax_prefetch_budget_blocks_total{model_name="tiny"} 0.0' in text
    assert 'pipemax_stage_seconds_total{stage="1",state="wait_kv"} 2.0' in text
    assert 'pipemax_kv_offload_load_bytes_total{model_name="tiny"} 2000.0' in text
    success = 'pipemax_request_success_total{finished_reason="length",model_name="tiny"} 1.0'
    assert success in text


def test_latency_between_tokens_is_the_mean_after_the_first(view: StatusView) -> None:
    view.refresh()
    text = exposition(view, result())
    assert 'pipemax_inter_token_latency_seconds_sum{model_name="tiny"} 0.1' in text


def test_errors_of_predicted_steps_are_a_histogram_by_stage(view: StatusView) -> None:
    metrics = Metrics("tiny", lambda: view.latest)
    metrics.step_predicted(1, 0.07)
    text = generate_latest(metrics.registry).decode()
    check_metrics(text)
    assert 'pipemax_step_time_relative_error_bucket{le="0.05",stage="1"} 0.0' in text
    assert 'pipemax_step_time_relative_error_bucket{le="0.08",stage="1"} 1.0' in text


def test_counters_go_on_when_a_process_restarts(view: StatusView) -> None:
    view.stage_step(0, dict.fromkeys(STATES, 5.0))
    view.stage_seconds("stage-0", dict.fromkeys(STATES, 1.0))
    assert view.refresh().stages[0].state_seconds["compute"] == 6.0


def test_links_grow_by_differences_and_restart_from_zero(view: StatusView) -> None:
    assert view.kv_report(report(100, 1.0)) == ([100, 100], [1.0, 1.0])
    assert view.kv_report(report(150, 1.5)) == ([50, 50], [0.5, 0.5])
    assert view.kv_report(report(30, 0.5)) == ([30, 30], [0.5, 0.5])
    assert view.refresh().load_bytes == 2 * (150 + 30)


def test_jobs_are_counted_by_state(view: StatusView) -> None:
    view.refresh()
    metrics = Metrics("tiny", lambda: view.latest)
    metrics.collector.jobs = JobTotals(
        jobs=Counter(running=2, finished=1),
        requests_pending=7,
        requests_finished=5,
        journal_bytes=4096,
    )
    text = generate_latest(metrics.registry).decode()
    check_metrics(text)
    for state, count in (("running", 2), ("finished", 1), ("held", 0)):
        assert f'pipemax_jobs{{model_name="tiny",state="{state}"}} {count}.0' in text
    assert 'pipemax_job_requests_pending{model_name="tiny"} 7.0' in text
    assert 'pipemax_job_requests_finished{model_name="tiny"} 5.0' in text
    assert 'pipemax_journal_bytes{model_name="tiny"} 4096.0' in text


def test_links_tiers_phase_and_slots(view: StatusView) -> None:
    view.kv_report(report(1000, 0.5))
    view.refresh()
    text = exposition(view)
    check_metrics(text)
    assert 'pipemax_link_bytes_total{direction="load",stage="1"} 1000.0' in text
    assert 'pipemax_link_busy_seconds_total{direction="load",stage="0"} 0.5' in text
    assert 'pipemax_link_queued_load_bytes{stage="1"} 7.0' in text
    assert 'pipemax_kv_blocks{model_name="tiny",tier="host"} 0.0' in text
    assert 'pipemax_phase{model_name="tiny",phase="starting"} 1.0' in text
    assert 'pipemax_phase{model_name="tiny",phase="ready"} 0.0' in text
    assert 'pipemax_missing_processes{model_name="tiny"} 3.0' in text
    assert 'pipemax_slot_requests{slot="1"} 0.0' in text


def test_time_that_the_coordinator_did_not_wait_is_busy(view: StatusView) -> None:
    before = view.refresh()
    after = view.refresh()
    grown = after.coordinator_busy_seconds - before.coordinator_busy_seconds
    assert grown == pytest.approx(after.uptime_s - before.uptime_s)
    view.waited(10.0)
    assert view.refresh().coordinator_busy_seconds == 0.0


def test_unfinished_jobs_have_a_series_each_and_an_eta_if_there_is_one(view: StatusView) -> None:
    def progress(name: str, eta_s: float | None) -> JobProgress:
        return JobProgress(
            name=name, state="running", num_requests=9, num_results=4, num_failed=1, eta_s=eta_s
        )

    view.jobs = (progress("night", 12.5), progress("day", None))
    view.refresh()
    text = exposition(view)
    check_metrics(text)
    assert 'pipemax_job_size_requests{job_name="day"} 9.0' in text
    assert 'pipemax_job_failed_results{job_name="night"} 1.0' in text
    assert 'pipemax_job_eta_seconds{job_name="night"} 12.5' in text
    assert 'pipemax_job_eta_seconds{job_name="day"}' not in text
