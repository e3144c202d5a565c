"""What offloading gains in the real system on the CPU, and what the simulator says it would.

    python ops/benchmarks/offload_cpu.py [--rounds 3] [--stages 2] [--link 160MiB] [--json OUT]
                                         [--keep DIR] [--replay DIR] [--quick]

Two stages with one thread each, a device pool of a quarter of the working set (all requests at
their full lengths at once), a link slowed down to `--link` bytes per second and direction. The
model is large and the pool holds few requests, so that a decode step is mostly reading weights, as
with a 70B model on 24 GB cards; requests have 192 prompt and 352 output tokens on average. Three
contenders take turns, each time with a fresh system:

    recompute   offloading off: requests that no longer fit are computed again (policy pipemax)
    fcfs        offloading, policy fcfs
    pipemax     offloading, policy pipemax

All requests are submitted at once and generate to their full lengths; seconds are from the first
submission to the last result. Then the costs seen in these runs (of steps, links and messages) go
into the simulator, which runs the same requests with the same scheduler in virtual time; its ratios
are printed beside the measured ones.

With two stages offloading can hardly make batches larger: of two batches in flight one is computed
on and the other is loaded, so the pool holds both, as it does without offloading (N = 2 batches and
m = 2 buffers in the closed form of `pipemax plan`). What is left to gain is what admission keeps
free for growth, and what is computed again. With `--stages 4` half of the batches in flight can lie
on the host.

What differs from GPUs: a copy is a paced `memcpy` by a thread, so copies, attention and the
processes themselves share cores and memory bandwidth with the steps; steps that ran beside copies
are dearer, and the simulator is told so by costs of each contender's own steps (`own costs`). With
one cost model for all of them (`common costs`) it knows nothing of that.
"""

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from live_system import Lengths, Live, lognormal_lengths, running, versions
from measured_costs import Recording, jitter, latencies, measured_system, simulated

from pipemax.proto.geometry import BlockGeometry, blocks_for, split_layers
from pipemax.proto.sizes import parse_size
from pipemax.services.cli.options import EngineOptions
from pipemax.services.tiny_model import ModelShape, make_demo_model

SHAPE = ModelShape(
    num_layers=8,
    hidden_size=1024,
    intermediate_size=4096,
    num_heads=8,
    num_kv_heads=1,
    vocab_size=4096,
    dtype="bfloat16",
)
"""About 127 million parameters. The small vocabulary keeps the stages even, one KV head keeps the
copies small beside the weights."""
BLOCK_SIZE = 16
WORK_FILE = "work.json"
POOL_SHARE = 4
CONTENDERS = {"recompute": "pipemax", "fcfs": "fcfs", "pipemax": "pipemax"}
"""Name to policy; `recompute` has no host pool."""


@dataclass(slots=True)
class Runs:
    """What one contender did, round by round."""

    name: str
    recordings: list[Recording] = field(default_factory=list)

    @property
    def seconds(self) -> list[float]:
        return [recording.seconds for recording in self.recordings]

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)


def work_of(options: argparse.Namespace) -> list[Lengths]:
    if options.quick:
        return lognormal_lengths(12, 64, 96, 0.4, seed=3)
    return lognormal_lengths(options.requests, 192, 352, 0.4, seed=3)


def working_set_blocks(work: list[Lengths]) -> int:
    return sum(blocks_for(one.prompt_tokens + one.output_tokens, BLOCK_SIZE) for one in work)


def engine_options(
    name: str, model: Path, work: list[Lengths], options: argparse.Namespace
) -> EngineOptions:
    split = split_layers(SHAPE.num_layers, options.stages)
    sizes = [
        BlockGeometry(n, BLOCK_SIZE, SHAPE.num_kv_heads, SHAPE.head_dim, "bfloat16").block_bytes
        for n in split
    ]
    total = working_set_blocks(work)
    host_blocks = 0 if name == "recompute" else 2 * total
    return EngineOptions(
        model=str(model),
        pipeline_parallel_size=options.stages,
        threads_per_stage=1,
        block_size=BLOCK_SIZE,
        max_model_len=max(one.prompt_tokens + one.output_tokens for one in work),
        kv_cache_memory_bytes=str(total // POOL_SHARE * max(sizes)),
        kv_offloading_size=str(host_blocks * sum(sizes)),
        emulate_link_bandwidth=options.link,
        policy=CONTENDERS[name],
    )


def take_turn(runs: Runs, model: Path, work: list[Lengths], options: argparse.Namespace) -> None:
    """One measured run in a system of its own."""
    out = model / f"{runs.name}.json"
    with running("bench-offload", engine_options(runs.name, model, work, options), out) as live:
        live.generate([Lengths(64, 4)] * 8)
        idle = latency_run(live)
        before = live.client.status()
        started_s, started = time.monotonic(), time.perf_counter()
        live.generate(work, seed=1)
        seconds = time.perf_counter() - started
        ended_s, after = time.monotonic(), live.client.status()
    recorded = json.loads(out.read_text())
    recording = Recording(
        steps=[s for s in recorded["steps"] if started_s <= s[0] <= ended_s],
        plans=[p for p in recorded["plans"] if started_s <= p[0] <= ended_s],
        seconds=seconds,
        before=before,
        after=after,
        latencies=latencies(recorded, *idle),
        config=live.config,
    )
    runs.recordings.append(recording)
    if options.keep:
        path = options.keep / f"run-{runs.name}-{len(runs.seconds)}.json"
        path.write_bytes(msgspec.json.encode(recording))
    print(f"{runs.name:<10} {seconds:7.2f} s  {recording.describe()}", flush=True)


def latency_run(live: Live) -> tuple[float, float, Any, Any]:
    """One request alone: what a token costs beside computing is the way between processes."""
    before, started_s = live.client.status(), time.monotonic()
    live.generate([Lengths(64, 48)])
    return started_s, time.monotonic(), before, live.client.status()


def report(runs: dict[str, Runs], work: list[Lengths]) -> dict[str, Any]:
    tokens = sum(one.output_tokens for one in work)
    print(f"\n{len(work)} requests, {tokens} output tokens")
    figures: dict[str, Any] = {}
    for name, own in runs.items():
        rates = [tokens / seconds for seconds in own.seconds]
        figures[name] = {"seconds": own.seconds, "output_tokens_per_s": rates}
        print(f"{name:<10} {tokens / own.median_s:7.1f} output tokens/s "
              f"({min(rates):.1f} to {max(rates):.1f})")  # fmt: skip
    return figures


def compare(runs: dict[str, Runs], work: list[Lengths], folder: Path) -> dict[str, Any]:
    """Ratios of pipemax's throughput to the others': measured, round by round, and simulated."""
    everything = [recording for own in runs.values() for recording in own.recordings]
    figures: dict[str, Any] = {}
    predicted: dict[str, dict[str, float]] = {"own costs": {}, "common costs": {}}
    for name, own in runs.items():
        for costs, recordings in (("own costs", own.recordings), ("common costs", everything)):
            system = measured_system(f"{name}, {costs}", own.recordings, recordings, SHAPE)
            path = folder / f"measured-{name}-{costs.split()[0]}.json"
            path.write_text(json.dumps(system, indent=2) + "\n")
            config = own.recordings[0].config
            noise = jitter(system, recordings)
            run = simulated(path, work, config, noise)
            took_s = predicted[costs][name] = run.simulated_s
            print(f"simulated {name:<10} with {costs:<12} {took_s:7.2f} s "
                  f"({took_s / own.median_s - 1:+.0%}), {run.steps} steps, jitter {noise:.0%}, "
                  f"{run.preemptions} preemptions")  # fmt: skip
    for name in runs:
        if name == "pipemax":
            continue
        rounds = [
            theirs / ours
            for theirs, ours in zip(runs[name].seconds, runs["pipemax"].seconds, strict=True)
        ]
        measured = statistics.median(rounds)
        line = (
            f"pipemax : {name}  measured ×{measured:.2f} ({min(rounds):.2f} to {max(rounds):.2f})"
        )
        figures[name] = {"measured": rounds}
        for costs, seconds in predicted.items():
            ratio = seconds[name] / seconds["pipemax"]
            figures[name][costs] = ratio
            line += f", simulated with {costs} ×{ratio:.2f} ({ratio / measured - 1:+.0%})"
        print(line)
    return {"ratios": figures, "simulated_s": predicted}


def run_all(
    runs: dict[str, Runs], model: Path, work: list[Lengths], options: argparse.Namespace
) -> None:
    if options.keep:
        options.keep.mkdir(parents=True, exist_ok=True)
        (options.keep / WORK_FILE).write_bytes(msgspec.json.encode(work))
    blocks = working_set_blocks(work)
    print(f"working set {blocks} blocks of {BLOCK_SIZE} tokens, device pool "
          f"{blocks // POOL_SHARE}, link {parse_size(options.link) / 1e6:.0f} MB/s",
          flush=True)  # fmt: skip
    make_demo_model(model, shape=SHAPE)
    for _ in range(1 if options.quick else options.rounds):
        for own in runs.values():
            take_turn(own, model, work, options)


def replay(folder: Path, runs: dict[str, Runs]) -> list[Lengths]:
    """Takes up what was kept; returns the requests."""
    for name, own in runs.items():
        for path in sorted(folder.glob(f"run-{name}-*.json")):
            own.recordings.append(msgspec.json.decode(path.read_bytes(), type=Recording))
            print(f"{name:<10} {own.seconds[-1]:7.2f} s  {own.recordings[-1].describe()}")
    return msgspec.json.decode((folder / WORK_FILE).read_bytes(), type=list[Lengths])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--requests", type=int, default=20)
    parser.add_argument("--link", default="160MiB", help="bytes per second and direction")
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--keep", type=Path, metavar="DIR", help="recordings and measured costs")
    parser.add_argument("--replay", type=Path, metavar="DIR", help="of --keep: run nothing, only "
                        "simulate")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="small requests, one round")
    options = parser.parse_args()
    if "pipemax" not in options.contenders:
        parser.error("--contenders: pipemax is what the others are compared with")
    work = work_of(options)
    runs = {name: Runs(name) for name in options.contenders}
    with tempfile.TemporaryDirectory(prefix="pipemax-bench-") as folder:
        if options.replay:
            work = replay(options.replay, runs)
        else:
            run_all(runs, Path(folder), work, options)
        figures = report(runs, work)
        figures |= compare(runs, work, options.keep or Path(folder))
    if options.json:
        options.json.write_text(json.dumps(figures | {"versions": versions()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
