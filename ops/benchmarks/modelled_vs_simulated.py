"""The modelled device beside the simulator: the same GPUs, model and requests, in one go.

    python ops/benchmarks/modelled_vs_simulated.py [--gpu rtx-3090] [--requests 200] [--scale 4]

Both take compute and link times from one performance model; they differ in all else. The simulator
runs the scheduler's and the KV daemon's cores in virtual time, with assumed latencies. The modelled
device is the real system: a process per stage, sockets, copies, threads, and the operating system's
scheduler, so that its ratio to the simulation says what those cost. `--scale` stretches modelled
time: at 4, a millisecond of this machine's overhead is a quarter of a millisecond of the GPU's. The
machine must be quiet.

Requests end where the workload says in both: the simulator stops them there, the modelled device
meets a stop token (its tokens are known beforehand; prompts are drawn until the token at the end
comes nowhere before it). Neither side knows beforehand.
"""

import argparse
import json
import random
import time
from dataclasses import asdict, dataclass, replace
from math import inf

from live_system import running, versions

from pipemax.client import Client, Completion, SamplingParams
from pipemax.proto.messages.ingest import Status
from pipemax.proto.states import STATES
from pipemax.services.cli.options import EngineOptions
from pipemax.services.cli.simulation_flags import SimulateFlags
from pipemax.services.simulator.command import build_spec
from pipemax.services.simulator.records import Result
from pipemax.services.simulator.spec import SimulationSpec
from pipemax.services.simulator.workload import Lengths, Workload
from pipemax.services.simulator.world import World
from pipemax.services.tiny_model import VOCAB_SIZE
from pipemax.stage_worker.modelled.marks import continuation

PROMPT_VOCAB_SIZE = 30_000


@dataclass(frozen=True, slots=True)
class Figures:
    """One side. Seconds and rates in the GPU's time."""

    seconds: float
    tokens_per_s: float
    """Prompt and output."""
    output_tokens_per_s: float
    prefetched_share: float
    """Of the context that steps read."""
    shares: dict[str, float]
    """Of all stages' time, by state."""


@dataclass(frozen=True, slots=True)
class Request:
    prompt: list[int]
    expected: list[int]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--gpu", default="rtx-3090")
    options.add_argument("--count", type=int, default=8)
    options.add_argument("--model", default="llama-2-70b")
    options.add_argument("--workload", default="300,100", help="as of pipemax simulate")
    options.add_argument("--sigma", type=float, default=0.3)
    options.add_argument("--requests", type=int, default=200)
    options.add_argument("--policy", default="pipemax")
    options.add_argument("--kv-offloading-size", default="400GB")
    options.add_argument(
        "--kv-cache-memory-bytes",
        default="600000000",
        help="of each GPU; by default less than it has, so that few requests make KV travel",
    )
    options.add_argument("--scale", type=float, default=4.0)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--json")
    asked = options.parse_args()
    spec = make_spec(asked)
    requests = make_requests(spec.workload, asked.seed)
    simulated = simulate(spec)
    modelled = run_modelled(asked, spec, requests)
    show(asked, spec, simulated, modelled)
    if asked.json:
        sides = {"simulated": asdict(simulated), "modelled": asdict(modelled)}
        record = {"asked": vars(asked), "versions": versions(), **sides}
        with open(asked.json, "w") as out:
            json.dump(record, out, indent=1)


def make_spec(asked: argparse.Namespace) -> SimulationSpec:
    """Without what the modelled device leaves out: the time a stage takes to start, and the limit
    that host memory sets to all links together."""
    flags = SimulateFlags(
        gpu=asked.gpu,
        count=asked.count,
        model=asked.model,
        workload=asked.workload,
        requests=asked.requests,
        sigma=asked.sigma,
        policy=asked.policy,
        kv_offloading_size=asked.kv_offloading_size,
        seed=asked.seed,
    )
    spec = build_spec(flags)
    timing = replace(spec.timing, load_s=0.0, host_memory_bytes_s=inf)
    blocks = None
    if asked.kv_cache_memory_bytes is not None:
        blocks = int(asked.kv_cache_memory_bytes) // max(spec.block_bytes)
    return replace(spec, timing=timing, device_blocks=blocks)


def make_requests(workload: Workload, seed: int) -> list[Request]:
    draw = random.Random(seed)
    return [_request(lengths, draw) for lengths in workload.requests]


def _request(lengths: Lengths, draw: random.Random) -> Request:
    prompt = [draw.randrange(PROMPT_VOCAB_SIZE) for _ in range(lengths.prompt_tokens)]
    while True:
        expected = continuation(prompt, lengths.output_tokens, VOCAB_SIZE)
        if expected.index(expected[-1]) == len(expected) - 1:
            return Request(prompt, expected)
        prompt[-1] = draw.randrange(PROMPT_VOCAB_SIZE)


def simulate(spec: SimulationSpec) -> Figures:
    result: Result = World(spec).run()
    spent = {
        state: sum(stage.state_s.get(state, 0.0) for stage in result.stages) for state in STATES
    }
    # Stages load their weights first; the modelled device is asked when it is ready.
    spent["wait_plan"] -= (result.simulated_s - result.working_s) * len(result.stages)
    return Figures(
        result.working_s,
        result.tokens_per_s,
        result.output_tokens_per_s,
        result.prefetched_tokens / max(1, result.context_tokens),
        _shares(spent),
    )


def run_modelled(
    asked: argparse.Namespace, spec: SimulationSpec, requests: list[Request]
) -> Figures:
    engine = EngineOptions(
        device=f"modelled:{asked.gpu}",
        model=asked.model,
        pipeline_parallel_size=asked.count,
        modelled_time_scale=asked.scale,
        policy=asked.policy,
        kv_offloading_size=asked.kv_offloading_size,
        kv_cache_memory_bytes=asked.kv_cache_memory_bytes,
        block_size=spec.block_size,
        max_num_seqs=spec.max_num_seqs,
        max_num_batched_tokens=spec.max_num_batched_tokens,
        max_model_len=spec.workload.max_model_len,
        seed=asked.seed,
    )
    with running("modelled-vs-simulated", engine) as live:
        before = live.client.status()
        started_s = time.monotonic()
        completions = _generate(live.client, requests, spec.workload.max_tokens)
        seconds = (time.monotonic() - started_s) / asked.scale
        after = live.client.status()
    wrong = sum(
        list(completion.token_ids) != request.expected
        for completion, request in zip(completions, requests, strict=True)
    )
    if wrong:
        raise SystemExit(f"{wrong} of {len(requests)} requests brought other tokens than they must")
    outputs = sum(len(request.expected) for request in requests)
    prompts = sum(len(request.prompt) for request in requests)
    context = after.context_tokens - before.context_tokens
    prefetched = after.prefetched_tokens - before.prefetched_tokens
    return Figures(
        seconds,
        (prompts + outputs) / seconds,
        outputs / seconds,
        prefetched / max(1, context),
        _shares({state: _spent(after, state) - _spent(before, state) for state in STATES}),
    )


def _generate(client: Client, requests: list[Request], max_tokens: int) -> list[Completion]:
    sampling = [
        SamplingParams(
            temperature=0.0,
            max_tokens=max_tokens,
            ignore_eos=True,
            stop_token_ids=(request.expected[-1],),
        )
        for request in requests
    ]
    return client.generate([request.prompt for request in requests], sampling)


def _spent(status: Status, state: str) -> float:
    return sum(stage.state_seconds.get(state, 0.0) for stage in status.stages)


def _shares(spent: dict[str, float]) -> dict[str, float]:
    total = sum(spent.values())
    return {state: seconds / total for state, seconds in spent.items()}


def show(
    asked: argparse.Namespace, spec: SimulationSpec, simulated: Figures, modelled: Figures
) -> None:
    print(
        f"{asked.model} on {asked.count} x {asked.gpu}, {asked.requests} requests of "
        f"{asked.workload}, policy {asked.policy}, {spec.num_device_blocks} device and "
        f"{spec.num_host_blocks} host blocks of {spec.block_size} tokens, "
        f"time scale {asked.scale:g}"
    )
    print()
    print("| | seconds | tokens/s | output tokens/s | prefetched | " + " | ".join(STATES) + " |")
    print("|---" * (5 + len(STATES)) + "|")
    for name, side in (("simulated", simulated), ("modelled device", modelled)):
        states = " | ".join(f"{side.shares[state]:.1%}" for state in STATES)
        print(
            f"| {name} | {side.seconds:.1f} | {side.tokens_per_s:.1f} "
            f"| {side.output_tokens_per_s:.1f} | {side.prefetched_share:.1%} | {states} |"
        )
    print()
    print(f"modelled / simulated throughput: {modelled.tokens_per_s / simulated.tokens_per_s:.3f}")


if __name__ == "__main__":
    main()
