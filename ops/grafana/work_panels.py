"""Panels that say what the system gets done, where KV lives and when jobs are finished."""

from panels import Panel, Query
from promql import of, per_second, quantile

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
