"""A run as a table for people and as plain data for programs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from pipemax.proto.sizes import format_size
from pipemax.services.simulator.gantt import seen_states
from pipemax.services.simulator.records import Result
from pipemax.services.simulator.spec import SimulationSpec

_CAUTION = (
    "Models of peers are our reading of how those systems schedule, on the same modelled GPUs; "
    "they are no measurements of them."
)


@dataclass(frozen=True, slots=True)
class Run:
    """What was simulated and what came out."""

    heading: str
    spec: SimulationSpec
    result: Result
    peer: bool = False
    """A model of another system, without our cores."""


def describe(spec: SimulationSpec) -> str:
    """One line: model, hardware and load."""
    load = f"{len(spec.workload.requests)} requests, {spec.workload.name}"
    return f"{spec.model.name} on {spec.num_gpus} × {spec.gpu.name}, {load}"


def result_view(runs: Sequence[Run]) -> RenderableType:
    """Tables: the runs side by side, then each stage's time by state."""
    parts: list[RenderableType] = [_summary(runs)]
    if any(run.peer for run in runs):
        parts += ["", _CAUTION]
    for run in runs:
        if not run.peer:
            title, states = f"Time of the stages, {run.heading}", seen_states([run.result])
            parts += ["", _stages(title, run.result, states)]
    return Group(*parts)


def result_data(run: Run) -> dict[str, Any]:
    """Figures of one run under the names users know from other throughput benchmarks, then ours."""
    spec, result = run.spec, run.result
    return {
        "system": run.heading if run.peer else "pipemax",
        "is_model_of_peer": run.peer,
        "elapsed_time": result.working_s,
        "start_seconds": result.start_s,
        "num_requests": result.finished,
        "total_num_tokens": result.prompt_tokens + result.generation_tokens,
        "requests_per_second": result.requests_per_s,
        "tokens_per_second": result.tokens_per_s,
        "output_tokens_per_second": result.output_tokens_per_s,
        "steady_seconds": result.steady_s,
        "steady_output_tokens_per_second": result.steady_tokens_per_s,
        "model": spec.model.name,
        "gpu": spec.gpu.name,
        "num_gpus": spec.num_gpus,
        "workload": spec.workload.name,
        "policy": None if run.peer else spec.policy,
        "prefill": None if run.peer else spec.prefill,
        "seed": spec.seed,
        "host_bytes": spec.host_bytes,
        "requests_unfinished": result.num_requests - result.finished,
        "steps": result.steps,
        "preemptions": result.preemptions,
        "recomputed_tokens": result.recomputed_tokens,
        "prefetched_tokens": result.prefetched_tokens,
        "context_tokens": result.context_tokens,
        "num_device_blocks": result.num_device_blocks,
        "num_host_blocks": result.num_host_blocks,
        "block_size": result.block_size,
        "bubble_share": result.bubble_share,
        "steady_bubble_share": result.steady_bubble_share,
        "stages": [
            {
                "layers": layers,
                "state_seconds": result.state_s_since_start(stage),
                "load_bytes": stage.load_bytes,
                "store_bytes": stage.store_bytes,
                "load_busy_seconds": stage.load_busy_s,
                "store_busy_seconds": stage.store_busy_s,
            }
            for layers, stage in zip(spec.layers, result.stages, strict=True)
        ],
        "kv_over_time": [
            {
                "at_seconds": sample.at_s,
                "device_tokens": sample.device_tokens,
                "host_tokens": sample.host_tokens,
                "requests_running": sample.running,
                "requests_waiting": sample.waiting,
            }
            for sample in result.timeline
        ],
    }


def _summary(runs: Sequence[Run]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("")
    for run in runs:
        table.add_column(run.heading, justify="right", overflow="fold")
    columns = [_figures(run) for run in runs]
    for label in columns[0]:
        table.add_row(label, *(column[label] for column in columns))
    if len(runs) > 1:
        first, *others = (run.result for run in runs)
        ratios = ("", *(_ratio(first, other) for other in others))
        table.add_row("first column over this one", *ratios, style="bold")
    return table


def _ratio(ours: Result, other: Result) -> str:
    """Of the first column to another."""
    base = other.output_tokens_per_s
    return f"×{ours.output_tokens_per_s / base:.2f}" if base else "–"


def _figures(run: Run) -> Mapping[str, str]:
    spec, result = run.spec, run.result
    loaded = sum(stage.load_bytes for stage in result.stages)
    stored = sum(stage.store_bytes for stage in result.stages)
    steady = f"{result.steady_tokens_per_s:,.0f}" if result.steady_s else "–"
    steady += f" for {result.steady_s:,.0f} s" if result.steady_s else ""
    batch = result.generation_tokens / result.steps if result.steps else 0.0
    share = result.prefetched_tokens / result.context_tokens if result.context_tokens else 0.0
    return {
        "simulated time": f"{result.working_s:,.1f} s",
        "start before that": f"{result.start_s:,.1f} s",
        "requests finished": f"{result.finished:,} of {result.num_requests:,}",
        "output tokens/s": f"{result.output_tokens_per_s:,.0f}",
        "all tokens/s": f"{result.tokens_per_s:,.0f}",
        "output tokens/s while requests wait": steady,
        "output tokens per step": f"{batch:.1f}",
        "steps": f"{result.steps:,}",
        "bubbles": f"{result.bubble_share:.1%}",
        "KV room, devices": f"{result.num_device_blocks * spec.block_size:,} tokens",
        "KV room, host": f"{result.num_host_blocks * spec.block_size:,} tokens",
        "context brought from the host": f"{share:.0%}",
        "host to devices": format_size(loaded),
        "devices to host": format_size(stored),
        "preemptions": f"{result.preemptions:,}",
        "tokens computed again": f"{result.recomputed_tokens:,}",
    }


def _stages(title: str, result: Result, states: Sequence[str]) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
    )
    for heading in ("stage", *states, "link busy"):
        table.add_column(heading, justify="right", overflow="fold")
    for index, stage in enumerate(result.stages):
        total, state_s = result.working_s, result.state_s_since_start(stage)
        table.add_row(
            str(index),
            *(f"{state_s[state] / total:.1%}" for state in states),
            f"{stage.load_busy_s / total:.1%}",
        )
    return table
