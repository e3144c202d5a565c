"""What offloading gains in decode: the shipped scheduler in simulation beside the closed form.

    python ops/benchmarks/simulate_gain.py [--gpus rtx-3090 a10 ...] [--policy NAME]

Llama-2-70B in bfloat16 on 8 GPUs of each kind, ShareGPT means with a small spread, roofline
assumptions only: messages, planning and activations take no time, and prompts cost no compute, so
that every step is a decode step. Both sides of each ratio run here, with the same requests. The
rate counts from half the run on, while requests still wait.

The closed form knows neither that room must be kept for requests to grow, nor whole requests, nor
blocks: both columns of rates are shown, so that one sees on which side a difference arises.
"""

import argparse
import json
import time
from dataclasses import replace

from pipemax.coordinator.policy import DEFAULT_POLICY
from pipemax.services.simulator.closed_form import decode_forecast
from pipemax.services.simulator.records import Result
from pipemax.services.simulator.spec import IDEAL, SimulationSpec
from pipemax.services.simulator.workload import lognormal
from pipemax.services.simulator.world import World
from pipemax.stage_worker.modelled.catalogue import load_catalogue

GPUS = ("rtx-3090", "rtx-4090", "a10", "rtx-5090", "l20")
MEAN_IN, MEAN_OUT = 343.76, 237.20
NUM_GPUS = 8


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--gpus", nargs="+", default=GPUS)
    options.add_argument("--policy", default=DEFAULT_POLICY)
    options.add_argument("--sigma", type=float, default=0.3)
    options.add_argument("--block-size", type=int, default=32)
    options.add_argument("--lifetimes", type=float, default=3.0)
    options.add_argument("--means", type=float, nargs=2, default=(MEAN_IN, MEAN_OUT))
    options.add_argument("--json")
    asked = options.parse_args()
    print(
        "| GPU | closed form, off → on, tokens/s | gain | simulated, off → on, tokens/s | gain | "
        "deviation | device KV in use, off / on | bubbles, off / on | wall s |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    records = [measure(gpu, asked) for gpu in asked.gpus]
    if asked.json:
        with open(asked.json, "w") as out:
            json.dump(records, out, indent=1)


def measure(gpu: str, asked: argparse.Namespace) -> dict[str, object]:
    spec = make_spec(gpu, asked)
    context = spec.workload.mean_decode_context
    closed = [
        decode_forecast(spec.stages[0], NUM_GPUS, context, offload=offload)
        for offload in (False, True)
    ]
    started = time.perf_counter()
    runs = [World(replace(spec, host_bytes=0)).run(), World(spec).run()]
    wall_s = time.perf_counter() - started
    expected = closed[1].tokens_s / closed[0].tokens_s
    found = runs[1].steady_tokens_per_s / runs[0].steady_tokens_per_s
    uses = [device_use(run, spec) for run in runs]
    print(
        f"| {gpu} | {closed[0].tokens_s:.0f} → {closed[1].tokens_s:.0f} | ×{expected:.2f} "
        f"| {runs[0].steady_tokens_per_s:.0f} → {runs[1].steady_tokens_per_s:.0f} | ×{found:.2f} "
        f"| {found / expected - 1:+.1%} | {uses[0]:.0%} / {uses[1]:.0%} "
        f"| {runs[0].steady_bubble_share:.1%} / {runs[1].steady_bubble_share:.1%} | {wall_s:.0f} |",
        flush=True,
    )
    return {
        "gpu": gpu,
        "policy": spec.policy,
        "closed_form_tokens_s": [forecast.tokens_s for forecast in closed],
        "simulated_tokens_s": [run.steady_tokens_per_s for run in runs],
        "closed_form_gain": expected,
        "simulated_gain": found,
        "device_kv_use": uses,
        "bubble_share": [run.steady_bubble_share for run in runs],
        "simulated_s": [run.simulated_s for run in runs],
        "steps": [run.steps for run in runs],
        "wall_s": wall_s,
    }


def make_spec(gpu: str, asked: argparse.Namespace) -> SimulationSpec:
    """A run of so many times what a request takes from its first token to its last."""
    catalogue = load_catalogue()
    mean_in, mean_out = asked.means
    spec = SimulationSpec(
        gpu=catalogue.gpu(gpu),
        num_gpus=NUM_GPUS,
        model=catalogue.model("llama-2-70b"),
        workload=lognormal("lengths", mean_in, mean_out, 1, seed=0, sigma=0),
        timing=IDEAL,
        host_bytes=2 * 10**12,
        block_size=asked.block_size,
        max_num_batched_tokens=16384,
        free_prefill=True,
        policy=asked.policy,
    )
    forecast = decode_forecast(spec.stages[0], NUM_GPUS, mean_in + mean_out / 2, offload=True)
    horizon_s = asked.lifetimes * mean_out * NUM_GPUS * forecast.step_s
    # Enough that some still wait at the end: those that finish, and those in flight, twice over.
    finishing = forecast.tokens_s * horizon_s / mean_out
    num_requests = round(2 * (finishing + NUM_GPUS * forecast.batch))
    workload = lognormal("lengths", mean_in, mean_out, num_requests, seed=0, sigma=asked.sigma)
    return replace(spec, workload=workload, horizon_s=horizon_s, warm_up_s=horizon_s / 2)


def device_use(run: Result, spec: SimulationSpec) -> float:
    """Mean share of the device pool that holds KV, in the measured half."""
    capacity = run.num_device_blocks * run.block_size
    used = [s.device_tokens for s in run.timeline if s.at_s >= spec.warm_up_s]
    return sum(used) / len(used) / capacity


if __name__ == "__main__":
    main()
