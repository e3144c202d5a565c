"""What to expect of a model on some GPUs: closed form, rates of a short simulation beside it if one
was run, and advice in words. Runs nothing itself."""

from dataclasses import dataclass, replace
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from pipemax.proto.sizes import format_size
from pipemax.services.simulator.closed_form import (
    DecodeForecast,
    decode_forecast,
    end_to_end_tokens_s,
)
from pipemax.services.simulator.report import describe
from pipemax.services.simulator.spec import SimulationSpec
from pipemax.stage_worker.modelled.roofline import StageModel

WORTH_IT = 1.02
"""A smaller gain in decode is not worth the host memory."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Forecast of a spec: closed form, every request at the workload's mean context."""

    spec: SimulationSpec
    stage: StageModel
    """The stage with most layers: it has the least room and the longest steps."""
    mean_context: float
    without: DecodeForecast
    with_offload: DecodeForecast | None
    """None with host memory of 0."""
    prefill_tokens_s: float

    @property
    def decode_gain(self) -> float:
        """Decode rate with offloading over that without."""
        best = self.with_offload or self.without
        return best.tokens_s / self.without.tokens_s

    def end_to_end_tokens_s(self, decode: DecodeForecast) -> float:
        """Prompt and output tokens per second when prefill and decode take turns."""
        load = self.spec.workload
        return end_to_end_tokens_s(
            load.mean_in, load.mean_out, self.prefill_tokens_s, decode.tokens_s
        )

    @property
    def host_bytes_needed(self) -> float:
        """Host memory, all stages together, for what the link can keep in use."""
        if self.with_offload is None:
            return 0.0
        tokens = self.with_offload.prefetched_tokens * self.spec.num_gpus
        return tokens * sum(stage.kv_token_bytes for stage in self.spec.stages)


@dataclass(frozen=True, slots=True)
class ShortRun:
    """Rates of two short simulations, prompt and output tokens per second; see `short_run`."""

    num_requests: int
    fills_devices: bool
    """The requests are enough to fill the devices' KV room."""
    without: float
    with_offload: float | None
    """None with host memory of 0."""

    @property
    def gain(self) -> float:
        return (self.with_offload or self.without) / self.without


def make_plan(spec: SimulationSpec) -> Plan:
    """Raises ConfigError when the weights do not fit."""
    stage = max(spec.stages, key=lambda model: model.num_layers)
    if spec.gpus_per_uplink > 1:
        share = stage.gpu.link_bytes_s / spec.gpus_per_uplink
        stage = replace(stage, gpu=replace(stage.gpu, link_bytes_s=share))
    context = spec.workload.mean_decode_context
    slots = spec.num_gpus
    host_tokens = spec.num_host_blocks * spec.block_size
    return Plan(
        spec,
        stage,
        context,
        decode_forecast(stage, slots, context, offload=False),
        decode_forecast(stage, slots, context, offload=True, host_tokens=host_tokens)
        if spec.host_bytes
        else None,
        stage.prefill_tokens_s(spec.workload.mean_in, spec.max_num_batched_tokens),
    )


def advice(plan: Plan) -> str:
    """One or two plain sentences."""
    without, with_it = plan.without, plan.with_offload
    knee = plan.stage.knee
    if with_it is None:
        return "Offloading is off; give --kv-offloading-size to see what it would bring."
    gain = plan.decode_gain
    if gain < WORTH_IT and without.batch >= knee:
        return (
            f"Offloading gains nothing here: decode is already compute-bound at "
            f"{without.batch:.0f} requests per batch (the knee is at {knee:.0f}). Turn it off: "
            "--kv-offloading-size 0."
        )
    if gain < WORTH_IT:
        return (
            f"Offloading gains next to nothing (×{gain:.2f}): what the link or host memory adds is "
            "small beside what the devices hold. Turn it off: --kv-offloading-size 0."
        )
    ends = plan.end_to_end_tokens_s(with_it) / plan.end_to_end_tokens_s(without)
    text = (
        f"Offloading pays: decode ×{gain:.2f}, with prefill ×{ends:.2f}. The link keeps "
        f"{format_size(plan.host_bytes_needed)} of host memory in use."
    )
    if with_it.batch >= knee:
        text += (
            f" It lifts decode to the compute knee ({knee:.0f} requests per batch): a faster link "
            "or more memory would add little."
        )
    return text


def plan_data(plan: Plan, simulated: ShortRun | None = None) -> dict[str, Any]:
    """The plan as plain data."""
    spec = plan.spec
    both = {"without_offloading": plan.without, "with_offloading": plan.with_offload}
    return {
        "model": spec.model.name,
        "gpu": spec.gpu.name,
        "num_gpus": spec.num_gpus,
        "workload": spec.workload.name,
        "layer_split": list(spec.layers),
        "weights_bytes_per_stage": [stage.weights_bytes for stage in spec.stages],
        "block_size": spec.block_size,
        "device_blocks": spec.num_device_blocks,
        "host_blocks": spec.num_host_blocks,
        "compute_knee_requests": plan.stage.knee,
        "mean_decode_context_tokens": plan.mean_context,
        "prefill_tokens_per_second": plan.prefill_tokens_s,
        **{
            name: {
                "requests_per_batch": forecast.batch,
                "step_seconds": forecast.step_s,
                "decode_tokens_per_second": forecast.tokens_s,
                "tokens_per_second": plan.end_to_end_tokens_s(forecast),
            }
            for name, forecast in both.items()
            if forecast is not None
        },
        "decode_gain": plan.decode_gain,
        "simulated": simulated
        and {
            "num_requests": simulated.num_requests,
            "fills_devices": simulated.fills_devices,
            "tokens_per_second_without_offloading": simulated.without,
            "tokens_per_second_with_offloading": simulated.with_offload,
            "gain": simulated.gain,
        },
        "host_bytes_needed": plan.host_bytes_needed,
        "advice": advice(plan),
    }


def plan_view(plan: Plan, simulated: ShortRun | None = None) -> RenderableType:
    """Two tables and the advice."""
    parts: list[RenderableType] = [_placement(plan), "", _rates(plan, simulated), "", advice(plan)]
    if simulated:
        parts += ["", _remark(simulated)]
    return Group(*parts)


def _remark(simulated: ShortRun) -> str:
    """What to think of the short simulation."""
    text = (
        f"Simulated: the real scheduler with the first {simulated.num_requests} requests, their "
        "start and end included, which the closed form knows nothing of."
    )
    if not simulated.fills_devices:
        text += (
            " So few do not fill the devices, so there is nothing to offload; `pipemax simulate "
            "--compare --requests N` runs more, and takes longer."
        )
    return text


def _placement(plan: Plan) -> Table:
    spec = plan.spec
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    largest = plan.stage
    usable = largest.efficiencies.usable_memory * spec.gpu.memory_bytes
    size = spec.block_size
    rows = (
        ("pipeline", describe(spec)),
        ("layers per stage", ", ".join(map(str, spec.layers))),
        (
            "memory of a GPU",
            f"{usable / 1e9:.1f} GB usable: weights {largest.weights_bytes / 1e9:.1f}, "
            f"reserved {largest.efficiencies.reserved_bytes / 1e9:.1f}, "
            f"KV {largest.kv_bytes / 1e9:.1f}",
        ),
        (
            "KV on devices",
            f"{spec.num_device_blocks:,} blocks, {spec.num_device_blocks * size:,} tokens",
        ),
        (
            "KV in host memory",
            f"{spec.num_host_blocks:,} blocks, {spec.num_host_blocks * size:,} tokens",
        ),
        ("compute knee", f"{largest.knee:.0f} requests per batch"),
        ("mean context in decode", f"{plan.mean_context:,.0f} tokens"),
    )
    for row in rows:
        table.add_row(*row)
    return table


def _rates(plan: Plan, simulated: ShortRun | None) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    headings = ["", "requests per batch", "step", "decode tokens/s", "all tokens/s"]
    headings += ["all tokens/s, simulated"] if simulated else []
    for heading in headings:
        table.add_column(heading, justify="right" if heading else "left", overflow="fold")
    rows = [("without offloading", plan.without, simulated and simulated.without)]
    if plan.with_offload is not None:
        found = simulated and simulated.with_offload
        rows.append(("with offloading", plan.with_offload, found))
    for name, forecast, rate in rows:
        table.add_row(
            name,
            f"{forecast.batch:.1f}",
            f"{forecast.step_s * 1e3:.1f} ms",
            f"{forecast.tokens_s:,.0f}",
            f"{plan.end_to_end_tokens_s(forecast):,.0f}",
            *([f"{rate:,.0f}"] if rate is not None else []),
        )
    if plan.with_offload is not None:
        gains = [f"×{plan.decode_gain:.2f}"]
        ends = plan.end_to_end_tokens_s(plan.with_offload) / plan.end_to_end_tokens_s(plan.without)
        gains += [f"×{ends:.2f}", *([f"×{simulated.gain:.2f}"] if simulated else [])]
        table.add_row("gain", "", "", *gains, style="bold")
    return table
