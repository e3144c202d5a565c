"""Panels that say why stages do not compute."""

from panels import Panel, Query
from promql import of, per_second

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
