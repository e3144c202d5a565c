"""Writes the dashboards that Grafana is provisioned with.

    python ops/grafana/make_dashboards.py

Expressions are PromQL over /metrics and over the rules in `ops/prometheus/`; a test asks a real
Prometheus each of them. `$instance` and `$stage` are the dashboards' variables.
"""

import json
from pathlib import Path
from typing import Any

from panels import Panel, Query, dashboard

TARGET = Path(__file__).parent / "dashboards"
STATE_COLOURS = {
    "compute": "#0072B2",
    "wait_plan": "#BBBBBB",
    "wait_activation": "#E69F00",
    "wait_kv": "#D55E00",
    "prepare": "#CC79A7",
    "send": "#56B4E9",
}
"""Of Okabe and Ito: people with any common colour blindness tell them apart."""
SHARES = "instance_stage_state:pipemax_stage_seconds:share1m"


def of(name: str, labels: str = "") -> str:
    """Series of the system looked at."""
    return f'{name}{{instance="$instance"{", " + labels if labels else ""}}}'


def per_second(name: str, labels: str = "") -> str:
    return f"rate({of(name, labels)}[$__rate_interval])"


def quantile(share: float, histogram: str) -> str:
    buckets = f"sum by (le) (rate({of(histogram + '_bucket')}[$__rate_interval]))"
    return f"histogram_quantile({share}, {buckets})"


def stat(title: str, about: str, expr: str, unit: str, most: float | None = None) -> Panel:
    queries = (Query(expr, ""),)
    return Panel(
        title=title,
        about=about,
        queries=queries,
        unit=unit,
        kind="stat",
        width=4,
        height=4,
        most=most,
    )


AT_A_GLANCE = (
    stat("Bubbles", "Share of all stages' time that is not compute.",
         of("instance:pipemax_bubble:share1m"), "percentunit", 1),
    stat("Slowest stage over the mean", "By compute time; 1 is balanced.",
         of("instance:pipemax_stage_imbalance:ratio5m"), "short"),
    stat("Late prefetches", "Share of steps that waited for their KV.",
         of("instance:pipemax_late_prefetches:ratio5m"), "percentunit", 1),
    stat("Coordinator busy", "Share of its time. Near 1, stages wait for plans.",
         of("instance:pipemax_coordinator_busy:share1m"), "percentunit", 1),
    stat("Output tokens", "Sampled per second.",
         of("instance:pipemax_generation_tokens:rate1m"), "short"),
    stat("Requests waiting", "None: stages have nothing to do, and bubbles mean nothing.",
         f"sum({of('pipemax_num_requests_waiting')})", "short"),
)  # fmt: skip

BUBBLES = (
    Panel(
        title="Stage $stage: where its time goes",
        about="The states sum to 1. All but compute is a bubble, and its name is the cause.",
        queries=(Query(of(SHARES, 'stage="$stage"'), "{{state}}"),),
        unit="percentunit",
        width=6,
        stacked=True,
        most=1,
        colours=STATE_COLOURS,
        repeat="stage",
    ),
    Panel(
        title="Bubbles of all stages by cause",
        about="Mean over the stages. The tallest colour is what to look after first.",
        queries=(Query("avg by (state) (" + of(SHARES, 'state!="compute"') + ")", "{{state}}"),),
        unit="percentunit",
        stacked=True,
        colours=STATE_COLOURS,
    ),
    Panel(
        title="Bubbles by stage",
        about="The stage with the fewest is the one that the others wait for.",
        queries=(Query(of("instance_stage:pipemax_bubble:share1m"), "stage {{stage}}"),),
        unit="percentunit",
        most=1,
    ),
)
BALANCE = (
    Panel(
        title="Compute time of a step, by stage",
        about="Lines apart: layers are shared out badly, or a device is slower than its like.",
        queries=(
            Query(
                per_second("pipemax_stage_seconds_total", 'state="compute"')
                + " / ignoring (state) "
                + per_second("pipemax_stage_steps_total"),
                "stage {{stage}}",
            ),
        ),
        unit="s",
    ),
    Panel(
        title="Error of predicted step times, median by stage",
        about="Micro-batches are evened out and prefetches planned by these predictions.",
        queries=(
            Query(
                of("instance_stage:pipemax_step_time_relative_error:median5m"), "stage {{stage}}"
            ),
        ),
        unit="percentunit",
    ),
    Panel(
        title="Requests in a step, by slot",
        about="Slots are micro-batches. The slowest of a round delays them all.",
        queries=(Query(of("pipemax_slot_requests"), "slot {{slot}}"),),
        unit="short",
        width=8,
    ),
    Panel(
        title="Context of a step, by slot",
        about="Tokens whose KV the requests that decode read: the other half of a step's time.",
        queries=(Query(of("pipemax_slot_context_tokens"), "slot {{slot}}"),),
        unit="short",
        width=8,
    ),
    Panel(
        title="Prompt tokens in a step, by slot",
        about="Prompts are computed in chunks that make all steps of a round equally long.",
        queries=(Query(of("pipemax_slot_prefill_tokens"), "slot {{slot}}"),),
        unit="short",
        width=8,
    ),
)
PREFETCH = (
    Panel(
        title="Prefetch: budget and use",
        about="KV blocks that links could bring in time, and those that were brought. Use at the "
        "budget: the link bounds how many requests run. Far below: there is little to bring.",
        queries=(
            Query(per_second("pipemax_prefetch_budget_blocks_total"), "budget"),
            Query(per_second("pipemax_prefetch_blocks_total"), "ordered"),
        ),
        unit="short",
        width=8,
    ),
    Panel(
        title="Prefetch budget in use",
        about="Ordered over allowed.",
        queries=(Query(of("instance:pipemax_prefetch_budget_used:ratio5m"), "in use"),),
        unit="percentunit",
        width=8,
        most=1,
    ),
    Panel(
        title="Late prefetches",
        about="Share of steps that waited for KV. The link was slower than measured before.",
        queries=(Query(of("instance:pipemax_late_prefetches:ratio5m"), "late"),),
        unit="percentunit",
        width=8,
    ),
    Panel(
        title="Link bandwidth while copying",
        about="By stage and direction, and what prefetches are planned with.",
        queries=(
            Query(
                of("instance_stage_direction:pipemax_link_bytes:rate_busy1m"),
                "{{direction}} {{stage}}",
            ),
            Query(of("pipemax_link_bandwidth_bytes_per_second"), "planned {{stage}}"),
        ),
        unit="Bps",
        width=8,
    ),
    Panel(
        title="Link in use",
        about="Share of time with a copy under way.",
        queries=(
            Query(
                of("instance_stage_direction:pipemax_link_busy:share1m"), "{{direction}} {{stage}}"
            ),
        ),
        unit="percentunit",
        width=8,
        most=1,
    ),
    Panel(
        title="Prefetches queued",
        about="Ordered and not yet copied. It should fall to zero again and again.",
        queries=(Query(of("pipemax_link_queued_load_bytes"), "stage {{stage}}"),),
        unit="bytes",
        width=8,
    ),
)

THROUGHPUT = (
    Panel(
        title="Tokens per second",
        about="Prompt tokens are counted once, however often they are computed.",
        queries=(
            Query(of("instance:pipemax_generation_tokens:rate1m"), "output"),
            Query(of("instance:pipemax_prompt_tokens:rate1m"), "prompt"),
        ),
        unit="short",
    ),
    Panel(
        title="Requests",
        about="None waiting: more could be submitted.",
        queries=(
            Query(of("pipemax_num_requests_running"), "running"),
            Query(of("pipemax_num_requests_waiting"), "waiting"),
        ),
        unit="short",
    ),
    Panel(
        title="Requests finished per second",
        about="By reason.",
        queries=(Query(per_second("pipemax_request_success_total"), "{{finished_reason}}"),),
        unit="short",
    ),
    Panel(
        title="Computed again",
        about="Tokens whose KV was given up, by preemption or in a crash.",
        queries=(
            Query(per_second("pipemax_recomputed_tokens_total"), "tokens"),
            Query(per_second("pipemax_num_preemptions_total"), "preemptions"),
        ),
        unit="short",
    ),
)
RESIDENCY = (
    Panel(
        title="KV blocks by tier",
        about="Host blocks include copies of blocks that are on the devices too.",
        queries=(
            Query(of("pipemax_kv_blocks"), "{{tier}}"),
            Query(of("pipemax_kv_blocks_capacity"), "{{tier}}: room"),
        ),
        unit="short",
    ),
    Panel(
        title="KV in use by tier",
        about="A full device pool is as it should be; a full host pool makes requests wait.",
        queries=(
            Query(of("pipemax_kv_cache_usage_perc"), "device"),
            Query(of("pipemax_kv_host_cache_usage_perc"), "host"),
        ),
        unit="percentunit",
        most=1,
    ),
    Panel(
        title="Context read after a prefetch",
        about="Share of the context that steps read which came from the host for them.",
        queries=(
            Query(
                per_second("pipemax_prefetched_tokens_total")
                + " / "
                + per_second("pipemax_context_tokens_total"),
                "prefetched",
            ),
        ),
        unit="percentunit",
        most=1,
    ),
    Panel(
        title="Shared prefixes",
        about="Of the prompt tokens that could be shared, those taken over and not computed.",
        queries=(
            Query(
                per_second("pipemax_prefix_cache_hits_total")
                + " / "
                + per_second("pipemax_prefix_cache_queries_total"),
                "taken over",
            ),
        ),
        unit="percentunit",
        most=1,
    ),
    Panel(
        title="KV moved",
        about="All links together.",
        queries=(
            Query(per_second("pipemax_kv_offload_load_bytes_total"), "host to device"),
            Query(per_second("pipemax_kv_offload_store_bytes_total"), "device to host"),
        ),
        unit="Bps",
    ),
)
JOBS = (
    Panel(
        title="Jobs: time left",
        about="Until the last result, if results go on coming as in the last five minutes.",
        queries=(Query(of("pipemax_job_eta_seconds"), "{{job_name}}"),),
        unit="s",
        kind="bargauge",
    ),
    Panel(
        title="Jobs: done",
        about="Results, errors among them, of all requests.",
        queries=(
            Query(
                of("pipemax_job_results") + " / " + of("pipemax_job_size_requests"), "{{job_name}}"
            ),
        ),
        unit="percentunit",
        kind="bargauge",
        most=1,
    ),
    Panel(
        title="Jobs: errors",
        about="Results that are errors.",
        queries=(Query(of("pipemax_job_failed_results"), "{{job_name}}"),),
        unit="short",
        width=8,
    ),
    Panel(
        title="Jobs by state",
        about="A job that is held waits for the model it was submitted to.",
        queries=(Query(of("pipemax_jobs"), "{{state}}"),),
        unit="short",
        width=8,
    ),
    Panel(
        title="Requests of jobs",
        about="Pending ones have no result yet.",
        queries=(
            Query(of("pipemax_job_requests_pending"), "pending"),
            Query(of("pipemax_job_requests_finished"), "with a result"),
        ),
        unit="short",
        width=8,
    ),
)
LATENCY = tuple(
    Panel(
        title=title,
        about=about,
        queries=tuple(
            Query(quantile(share, name), legend)
            for share, legend in ((0.5, "median"), (0.95, "95 %"))
        ),
        unit="s",
        width=6,
    )
    for title, about, name in (
        ("Time to first token", "From submission.", "pipemax_time_to_first_token_seconds"),
        ("Between tokens", "Mean of each request.", "pipemax_inter_token_latency_seconds"),
        ("Whole request", "From submission to result.", "pipemax_e2e_request_latency_seconds"),
        ("In the queue", "From submission to admission.", "pipemax_request_queue_time_seconds"),
    )
)
SYSTEM = (
    Panel(
        title="Phase",
        about="1 for the phase the system is in.",
        queries=(Query(of("pipemax_phase"), "{{phase}}"),),
        unit="short",
        width=8,
        most=1,
    ),
    Panel(
        title="Recoveries",
        about="Resets after the first, which is the start.",
        queries=(
            Query(of("pipemax_epoch") + " - 1", "recoveries"),
            Query(of("pipemax_missing_processes"), "processes missing"),
        ),
        unit="short",
        width=8,
    ),
    Panel(
        title="Journal",
        about="What jobs take on the disk.",
        queries=(Query(of("pipemax_journal_bytes"), "journal"),),
        unit="bytes",
        width=8,
    ),
)

DASHBOARDS: dict[str, Any] = {
    "pipemax-bubbles.json": dashboard(
        "pipemax-bubbles",
        "PipeMax: bubbles",
        "Why stages do not compute. How to read it: ops/bubbles.md.",
        (
            ("At a glance", AT_A_GLANCE),
            ("Bubbles", BUBBLES),
            ("Stage and slot balance", BALANCE),
            ("Prefetch and links", PREFETCH),
        ),
    ),
    "pipemax-work.json": dashboard(
        "pipemax-work",
        "PipeMax: work",
        "What the system gets done, where KV lives, when jobs are finished.",
        (
            ("Throughput and queue", THROUGHPUT),
            ("Jobs", JOBS),
            ("KV residency", RESIDENCY),
            ("Latency", LATENCY),
            ("System", SYSTEM),
        ),
    ),
}


def main() -> None:
    TARGET.mkdir(exist_ok=True)
    for name, made in DASHBOARDS.items():
        (TARGET / name).write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
