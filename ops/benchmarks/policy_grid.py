"""Policies against each other, end to end, in simulation: prompts, decode and the batch's tail.

    python ops/benchmarks/policy_grid.py [--pairs 5090/70b/sharegpt ...] [--policies pipemax ...]

Every cell is a whole batch on 8 GPUs, from the first plan to the last token: prompt and output
tokens per second. All cells of a row serve the same requests. `off` is the same scheduler without
host memory: plain pipeline parallelism.
"""

import argparse
import json
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

from pipemax.services.simulator.records import Result
from pipemax.services.simulator.spec import SimulationSpec
from pipemax.services.simulator.workload import parse_workload
from pipemax.services.simulator.world import World
from pipemax.stage_worker.modelled.catalogue import load_catalogue

NUM_GPUS = 8
FINISHED = 0.9
LOAD_S = 0.0
"""Loading the weights is left out: all policies load the same."""
GPUS = ("rtx-5090", "l20", "rtx-3090", "a10")
MODELS = ("llama-2-70b", "mixtral-8x7b")
WORKLOADS = ("sharegpt", "longbench")
POLICIES = (
    "pipemax",
    "oldest-first",
    "fcfs",
    "count-balanced",
    *(f"static-prefetch:{share}" for share in (0.05, 0.1, 0.15, 0.2, 0.25)),
    "off",
)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--pairs", nargs="+")
    options.add_argument("--policies", nargs="+", default=POLICIES)
    options.add_argument("--requests", type=int, default=3000)
    options.add_argument("--sigma", type=float, default=0.8)
    options.add_argument("--block-size", type=int, default=32)
    options.add_argument("--host-gb", type=float, default=400)
    options.add_argument("--staircase", action="store_true")
    options.add_argument("--max-num-batched-tokens", type=int, default=2048)
    options.add_argument("--prefill", choices=["mixed", "phases"], default="mixed")
    options.add_argument("--processes", type=int, default=1)
    options.add_argument("--json")
    asked = options.parse_args()
    pairs = asked.pairs or [f"{g}/{m}/{w}" for g in GPUS[:2] for m in MODELS for w in WORKLOADS]
    records = []
    with ProcessPoolExecutor(asked.processes) as pool:
        for pair in pairs:
            rows = list(pool.map(measure, [(pair, policy, asked) for policy in asked.policies]))
            best = max(row["tokens_per_s90"] for row in rows)
            print(f"## {pair}", flush=True)
            for row in rows:
                row["of_best"] = row["tokens_per_s90"] / best
                print(
                    f"{row['policy']:22} {row['tokens_per_s90']:8.0f} {row['of_best']:7.2%} "
                    f"bubbles {row['bubbles']:5.1%} "
                    f"steady {row['steady_bubbles']:5.1%} batch {row['batch']:6.1f} "
                    f"prefetched {row['prefetched']:5.1%} recomputed {row['recomputed']:8d} "
                    f"preempt {row['preemptions']:5d} late {row['late']:5d} "
                    f"sim {row['simulated_s']:7.0f} s wall {row['wall_s']:4.0f} s {row['states']}",
                    flush=True,
                )
            records += rows
    if asked.json:
        with open(asked.json, "w") as out:
            json.dump(records, out, indent=1)


def measure(question: tuple[str, str, argparse.Namespace]) -> dict[str, object]:
    pair, policy, asked = question
    spec = make_spec(pair, asked)
    if policy == "off":
        spec = replace(spec, host_bytes=0, policy="pipemax")
    else:
        spec = replace(spec, policy=policy)
    started = time.perf_counter()
    run: Result = World(spec).run()
    total = sum(sum(stage.state_s.values()) for stage in run.stages)
    states = {
        state: f"{sum(stage.state_s[state] for stage in run.stages) / total:.1%}"
        for state in run.stages[0].state_s
        if sum(stage.state_s[state] for stage in run.stages) / total > 0.001
    }
    requests = spec.workload.requests
    done = sum(requests[key].prompt_tokens + out for key, out in run.outputs.items())
    return {
        "pair": pair,
        "policy": policy,
        "prefill": spec.prefill,
        "tokens_per_s": run.tokens_per_s,
        "tokens_per_s90": done / run.simulated_s,
        "bubbles": run.bubble_share,
        "steady_bubbles": run.steady_bubble_share,
        "batch": run.generation_tokens / run.steps,
        "prefetched": run.prefetched_tokens / max(1, run.context_tokens),
        "recomputed": run.recomputed_tokens,
        "preemptions": run.preemptions,
        "late": run.late_prefetches,
        "simulated_s": run.simulated_s,
        "wall_s": time.perf_counter() - started,
        "states": states,
    }


def make_spec(pair: str, asked: argparse.Namespace) -> SimulationSpec:
    from pipemax.services.simulator.spec import Timing
    from pipemax.stage_worker.modelled.roofline import Efficiencies

    gpu, model, workload = pair.split("/")
    catalogue = load_catalogue()
    shape = catalogue.model(model)
    return SimulationSpec(
        gpu=catalogue.gpu(gpu),
        num_gpus=NUM_GPUS,
        model=shape,
        workload=parse_workload(workload, asked.requests, 0, asked.sigma),
        efficiencies=Efficiencies(gemm_staircase=asked.staircase),
        timing=Timing(load_s=LOAD_S),
        host_bytes=round(asked.host_gb * 1e9),
        block_size=asked.block_size,
        prefill=asked.prefill,
        max_num_batched_tokens=asked.max_num_batched_tokens,
        stop_when_finished=FINISHED,
    )


if __name__ == "__main__":
    main()
