"""A simulation short enough for `pipemax plan`: what the shipped scheduler makes of the plan."""

from collections.abc import Callable
from dataclasses import replace
from itertools import cycle, islice

from pipemax.services.simulator.planning import Plan, ShortRun
from pipemax.services.simulator.spec import SimulationSpec
from pipemax.services.simulator.workload import Workload
from pipemax.services.simulator.world import World

OUTPUT_TOKENS = 60_000
"""A run may generate about as many: some seconds of one core."""
_TIMES_IN_FLIGHT = 1.5
"""Requests of a run to those that the closed form has in flight: more fill the devices again and
again, and cost as much time."""
_FINISHED = 0.9
"""The last tenth of the requests to finish is left out: a long tail says little."""


def short_run(plan: Plan, update: Callable[[str], None] = lambda text: None) -> ShortRun:
    """Simulates some of the workload, prompts and all, without and with offloading. The requests
    are the workload's first; they repeat where it has too few. `update` hears what is going on."""
    spec = shortened(plan)
    num_requests = len(spec.workload.requests)
    fills = num_requests >= round(plan.without.batch * spec.num_gpus)
    update(f"simulating {num_requests} requests without offloading")
    without = World(replace(spec, host_bytes=0)).run().tokens_per_s
    if plan.with_offload is None:
        return ShortRun(num_requests, fills, without, None)
    update(f"simulating {num_requests} requests with offloading")
    return ShortRun(num_requests, fills, without, World(spec).run().tokens_per_s)


def shortened(plan: Plan) -> SimulationSpec:
    """The plan's spec with as many requests as a short run has."""
    spec, load = plan.spec, plan.spec.workload
    forecast = plan.with_offload or plan.without
    useful = round(_TIMES_IN_FLIGHT * forecast.batch * spec.num_gpus)
    affordable = round(OUTPUT_TOKENS / load.mean_out)
    num_requests = max(2 * spec.num_gpus, min(useful, affordable))
    requests = tuple(islice(cycle(load.requests), num_requests))
    timing = replace(spec.timing, disk_bytes_s=float("inf"))  # rates count from the start anyhow
    return replace(
        spec,
        workload=Workload(load.name, requests),
        timing=timing,
        stop_when_finished=_FINISHED,
    )
