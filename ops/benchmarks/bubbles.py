"""How much of the stages' time is not compute in steady decode: bubbles, by policy and spread.

    python ops/benchmarks/bubbles.py [--gpus rtx-3090 ...] [--sigmas 0.1 1] [--prompts free mixed]

Llama-2-70B in bfloat16 on 8 stages of 10 layers, ShareGPT means, KV offloaded, messages, planning,
hops and copies as `Timing` has them. Lengths are lognormal: a sigma of 0.1 is nearly equal, 1 is
very unequal. With `free` prompts cost no time, so that every step only decodes; with `mixed` they
ride on decode steps. Counted from half the run on, while requests still wait: bubbles are a stage's
time in any state but `compute`.

The last column says why: the longest of a round's 8 steps over their mean (one stage's compute
time, mean over the rounds of the last twentieth of the run). A pipeline that waits for its slowest
step loses at most the excess over 1 to that; the rest is messages, planning and late copies.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace

from pipemax.services.simulator.closed_form import decode_forecast
from pipemax.services.simulator.records import Interval, Result
from pipemax.services.simulator.spec import SimulationSpec, Timing
from pipemax.services.simulator.workload import MEANS, lognormal
from pipemax.services.simulator.world import World
from pipemax.stage_worker.modelled.catalogue import load_catalogue

GPUS = ("rtx-3090", "rtx-5090", "l20")
POLICIES = ("pipemax", "count-balanced")
PROMPTS = ("free", "mixed")
NUM_GPUS = 8
MEAN_IN, MEAN_OUT = MEANS["sharegpt"]
TARGETS = {0.1: 0.03, 1.0: 0.06}
"""By sigma: what `pipemax` is meant to stay under with free prompts."""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--gpus", nargs="+", default=GPUS)
    options.add_argument("--sigmas", nargs="+", type=float, default=(0.1, 1.0))
    options.add_argument("--policies", nargs="+", default=POLICIES)
    options.add_argument("--prompts", nargs="+", choices=PROMPTS, default=PROMPTS)
    options.add_argument("--block-size", type=int, default=32)
    options.add_argument("--lifetimes", type=float, default=2.0)
    options.add_argument("--json")
    asked = options.parse_args()
    records = []
    for prompts in asked.prompts:
        print(
            f"\nprompts {prompts}\n\n| GPU | sigma | policy | bubbles | where, of stage time | "
            "output tokens/s | requests per step | prefetched of context | longest / mean step |\n"
            "|---|---|---|---|---|---|---|---|---|",
            flush=True,
        )
        records += [
            measure(gpu, sigma, policy, prompts, asked)
            for gpu in asked.gpus
            for sigma in asked.sigmas
            for policy in asked.policies
        ]
    if asked.json:
        with open(asked.json, "w") as out:
            json.dump(records, out, indent=1)


def measure(
    gpu: str, sigma: float, policy: str, prompts: str, asked: argparse.Namespace
) -> dict[str, object]:
    spec = make_spec(gpu, sigma, policy, prompts, asked)
    started = time.perf_counter()
    run = World(spec).run()
    wall_s = time.perf_counter() - started
    if not run.steady_state_s or run.steady_s < 0.9 * (spec.horizon_s - spec.warm_up_s):
        raise SystemExit(f"{gpu}: nobody waited for most of the measured half; more requests")
    states = state_shares(run)
    lost = {state: share for state, share in states.items() if state != "compute"}
    where = ", ".join(f"{state} {share:.2%}" for state, share in lost.items() if share >= 5e-5)
    unevenness = longest_over_mean(run.intervals)
    target = TARGETS.get(sigma) if policy == "pipemax" and prompts == "free" else None
    missed = target is not None and run.steady_bubble_share >= target
    print(
        f"| {gpu} | {sigma:g} | {policy} | {run.steady_bubble_share:.2%}"
        f"{' (over the target)' if missed else ''} | {where} | {run.steady_tokens_per_s:.0f} "
        f"| {run.generation_tokens / run.steps:.0f} "
        f"| {run.prefetched_tokens / max(1, run.context_tokens):.0%} | {unevenness:.3f} |",
        flush=True,
    )
    return {
        "gpu": gpu,
        "sigma": sigma,
        "policy": policy,
        "prompts": prompts,
        "bubbles": run.steady_bubble_share,
        "states": states,
        "tokens_s": run.steady_tokens_per_s,
        "longest_over_mean": unevenness,
        "late_prefetches": run.late_prefetches,
        "preemptions": run.preemptions,
        "simulated_s": run.simulated_s,
        "steps": run.steps,
        "wall_s": wall_s,
    }


def make_spec(
    gpu: str, sigma: float, policy: str, prompts: str, asked: argparse.Namespace
) -> SimulationSpec:
    """A run of so many times what a request takes from its first token to its last."""
    catalogue = load_catalogue()
    free = prompts == "free"
    spec = SimulationSpec(
        gpu=catalogue.gpu(gpu),
        num_gpus=NUM_GPUS,
        model=catalogue.model("llama-2-70b"),
        workload=lognormal("lengths", MEAN_IN, MEAN_OUT, 1, seed=0, sigma=0),
        timing=Timing(load_s=0.0),
        host_bytes=400 * 10**9,
        block_size=asked.block_size,
        max_num_batched_tokens=16384 if free else 2048,
        free_prefill=free,
        policy=policy,
    )
    stage = spec.stages[0]
    forecast = decode_forecast(stage, NUM_GPUS, MEAN_IN + MEAN_OUT / 2, offload=True)
    horizon_s = asked.lifetimes * MEAN_OUT * NUM_GPUS * forecast.step_s
    # Enough that some still wait at the end: those that finish, and those in flight, twice over.
    finishing = forecast.tokens_s * horizon_s / MEAN_OUT
    num_requests = round(2 * (finishing + NUM_GPUS * forecast.batch))
    if not free:
        prompt_s = MEAN_IN / stage.prefill_tokens_s(MEAN_IN, spec.max_num_batched_tokens)
        horizon_s *= 1 + prompt_s / (MEAN_OUT / forecast.tokens_s)
    return replace(
        spec,
        workload=lognormal("lengths", MEAN_IN, MEAN_OUT, num_requests, seed=0, sigma=sigma),
        horizon_s=horizon_s,
        warm_up_s=horizon_s / 2,
        gantt_s=(0.95 * horizon_s, horizon_s),
    )


def state_shares(run: Result) -> dict[str, float]:
    """Shares of all stages' time in the steady window."""
    total = sum(sum(states.values()) for states in run.steady_state_s)
    names = run.steady_state_s[0]
    return {name: sum(states[name] for states in run.steady_state_s) / total for name in names}


def longest_over_mean(intervals: Sequence[Interval]) -> float:
    """Of a round's steps on the first stage, mean over the rounds recorded."""
    steps = [
        one.end_s - one.start_s for one in intervals if one.stage == 0 and one.state == "compute"
    ][1:-1]
    rounds = [steps[at : at + NUM_GPUS] for at in range(0, len(steps) - NUM_GPUS + 1, NUM_GPUS)]
    if not rounds:
        return float("nan")
    return sum(NUM_GPUS * max(one) / sum(one) for one in rounds) / len(rounds)


if __name__ == "__main__":
    main()
