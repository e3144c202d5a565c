"""Whole batches on modelled GPUs: the shipped scheduler beside models of other systems.

    python ops/benchmarks/end_to_end.py --results FILE [--pairs rtx-5090/llama-2-70b/sharegpt ...]

Every figure is a batch of requests on 8 GPUs from the first plan until 90 % of them have finished:
prompt and output tokens of those, per second of simulated time. What was computed of requests still
on their way is not counted there; `computed` counts it, too. All systems of a pair serve the same
requests, on the same GPU, links and host memory, with the same largest step. There are 3 (ShareGPT)
or 8 (LongBench) times as many requests as the pipeline's device memory holds at once at their mean
context. `pipemax` is a simulation of the shipped cores; `pipemax, no host memory` is the same
without offloading; all others are our models of peers (see `pipemax.services.simulator.peers`),
never measurements of them.

All-reduces of `vllm-tp` and `seesaw` are given twice: at the best the modelled host links allow,
and at --all-reduce-gb-s.

FILE holds one JSON record per line. What is in it is not run again; the tables at the end are of
all pairs in it.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

from pipemax.services.simulator.peers import PEERS, simulate_peer
from pipemax.services.simulator.spec import SimulationSpec, Timing
from pipemax.services.simulator.workload import MEANS, parse_workload, total_tokens
from pipemax.services.simulator.world import World
from pipemax.stage_worker.modelled.catalogue import load_catalogue

NUM_GPUS = 8
FINISHED = 0.9
TIMES_DEVICE = {"sharegpt": 3.0, "longbench": 8.0}
SIGMA = 0.8
BLOCK_SIZE = 32
HOST_BYTES = 400 * 10**9
"""The default of `pipemax simulate`, for all stages together; of the peers only Seesaw uses it."""
MAX_NUM_SEQS = 2048
"""As many as tokens in a step, so that it binds nobody: one tensor-parallel engine holds what eight
slots of a pipeline hold."""
PAIRS = tuple(
    f"{gpu}/{model}/{workload}"
    for workload in ("longbench", "sharegpt")
    for model in ("llama-2-70b", "mixtral-8x7b")
    for gpu in ("rtx-5090", "l20")
)
OURS = ("pipemax", "pipemax, no host memory")
WITH_ALL_REDUCES = ("vllm-tp", "seesaw")
PUBLISHED_UP_TO = {"vllm-pp": 2.51, "vllm-tp": 2.45, "td-pipe": 1.42, "seesaw": 1.38}
"""Largest ratios the PipeMax paper states, measured on 8 RTX 5090 or 8 L20 (arXiv 2605.02189)."""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--results", type=Path, required=True)
    options.add_argument("--pairs", nargs="+", default=PAIRS)
    options.add_argument("--all-reduce-gb-s", type=float, default=10.0)
    asked = options.parse_args()
    records = read(asked.results)
    for pair in asked.pairs:
        for system in systems(asked.all_reduce_gb_s):
            if any(one["pair"] == pair and one["system"] == system for one in records):
                continue
            record = measure(pair, system)
            records.append(record)
            with asked.results.open("a") as out:
                print(json.dumps(record), file=out)
            print(f"{pair} {system}: {record['tokens_s']:.0f} tokens/s", flush=True)
    print(tables(records))


def read(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def systems(slow_gb_s: float) -> list[str]:
    """Names as in the records; `NAME at N GB/s` is NAME with all-reduces at that bandwidth."""
    slow = [f"{name} at {slow_gb_s:g} GB/s" for name in WITH_ALL_REDUCES]
    return [*PEERS, *slow, *OURS]


def measure(pair: str, system: str) -> dict[str, object]:
    spec = make_spec(pair)
    started = time.perf_counter()
    if system in OURS:
        run = World(spec if system == OURS[0] else replace(spec, host_bytes=0)).run()
    else:
        name, _, bus = system.partition(" at ")
        bus_bytes_s = float(bus.removesuffix(" GB/s")) * 1e9 if bus else None
        _, _, run = simulate_peer(name, spec, bus_bytes_s)
    finished = [spec.workload.requests[key] for key in run.outputs]
    return {
        "pair": pair,
        "system": system,
        "requests": run.num_requests,
        "tokens_s": total_tokens(finished) / run.simulated_s,
        "computed_tokens_s": run.tokens_per_s,
        "not_compute": run.bubble_share,
        "requests_per_step": run.generation_tokens / run.steps,
        "tokens_per_step": (run.prompt_tokens + run.generation_tokens) / run.steps,
        "prefetched": run.prefetched_tokens / max(1, run.context_tokens),
        "recomputed": run.recomputed_tokens / (run.prompt_tokens + run.generation_tokens),
        "simulated_s": run.simulated_s,
        "wall_s": time.perf_counter() - started,
    }


def make_spec(pair: str) -> SimulationSpec:
    gpu, model, workload = pair.split("/")
    catalogue = load_catalogue()
    mean_in, mean_out = MEANS[workload]
    spec = SimulationSpec(
        gpu=catalogue.gpu(gpu),
        num_gpus=NUM_GPUS,
        model=catalogue.model(model),
        workload=parse_workload(workload, 1, 0, 0.0),
        timing=Timing(load_s=0.0),
        host_bytes=HOST_BYTES,
        block_size=BLOCK_SIZE,
        max_num_seqs=MAX_NUM_SEQS,
        policy="pipemax",
        stop_when_finished=FINISHED,
    )
    at_once = spec.num_device_blocks * BLOCK_SIZE / (mean_in + mean_out / 2)
    num_requests = round(TIMES_DEVICE[workload] * at_once)
    return replace(spec, workload=parse_workload(workload, num_requests, 0, SIGMA))


def tables(records: list[dict[str, object]]) -> str:
    """Markdown: one table for each pair, and the largest ratio of each peer."""
    pairs = list(dict.fromkeys(str(one["pair"]) for one in records))
    lines = []
    best: dict[str, tuple[float, str]] = {}
    for pair in pairs:
        rows = {str(one["system"]): one for one in records if one["pair"] == pair}
        ours = rows.get(OURS[0])
        count = next(iter(rows.values()))["requests"]
        lines += [
            f"\n### {pair}, {count} requests\n",
            "| system | tokens/s | pipemax to it | computed tokens/s | not compute "
            "| requests, tokens per step | prefetched of context | recomputed |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for system, row in rows.items():
            ratio = float(str(ours["tokens_s"])) / float(str(row["tokens_s"])) if ours else None
            lines.append(
                f"| {system} | {row['tokens_s']:.0f} | {f'{ratio:.2f}' if ratio else ''} "
                f"| {row['computed_tokens_s']:.0f} | {row['not_compute']:.1%} "
                f"| {row['requests_per_step']:.0f}, {row['tokens_per_step']:.0f} "
                f"| {row['prefetched']:.0%} | {row['recomputed']:.1%} |"
            )
            if ratio and ratio > best.get(system, (0.0, ""))[0]:
                best[system] = (ratio, pair)
    lines += [
        "\n### Largest ratio over each\n",
        "| over the model of | pipemax up to | on | the paper, measured, up to |",
        "|---|---|---|---|",
    ]
    for system, (ratio, pair) in best.items():
        published = PUBLISHED_UP_TO.get(system.partition(" at ")[0], "")
        if system != OURS[0]:
            lines.append(f"| {system} | {ratio:.2f} | {pair} | {published} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
