"""What planning costs the coordinator: microseconds per event by kind, and milliseconds per step.

    python ops/benchmarks/planner_cost.py [--requests 2000] [--stages 8] [--steps 400] ...

The shipped scheduling core is driven by perfect stages and a perfect KV daemon: every step comes
back, every block is stored, at once and at no cost; only the core's own time is taken. Requests
have lognormal lengths; finished ones are replaced. Measuring starts when as many as asked for run.
"""

import argparse
import gc
import platform
import statistics
import time
from dataclasses import fields

from pipemax.coordinator.policy import DEFAULT_POLICY
from pipemax.services.bench.planner import BLOCK_SIZE, PlannerBench, PlannerLoad


def report(bench: PlannerBench, steps: int) -> None:
    print(f"{'event':24} {'per step':>9} {'mean µs':>9} {'p99 µs':>9} {'ms/step':>8}")
    total = 0.0
    for kind, seconds in sorted(bench.seconds.items()):
        ordered = sorted(seconds)
        p99 = ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)]
        per_step = sum(seconds) / steps
        total += 0.0 if kind.startswith("encode") else per_step
        print(
            f"{kind:24} {len(seconds) / steps:9.2f} {statistics.mean(seconds) * 1e6:9.1f} "
            f"{p99 * 1e6:9.1f} {per_step * 1e3:8.3f}"
        )
    print(f"{'all events':24} {'':29} {total * 1e3:8.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=2000, help="running at a time")
    parser.add_argument("--waiting", type=int, default=8)
    parser.add_argument("--stages", type=int, default=8)
    parser.add_argument("--device-blocks", type=int, default=230_000)
    parser.add_argument("--host-blocks", type=int, default=200_000)
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--max-num-batched-tokens", type=int, default=4096)
    parser.add_argument("--link-blocks", type=float, default=2000, help="per step")
    parser.add_argument("--policy", default=DEFAULT_POLICY)
    parser.add_argument("--prompt-tokens", type=int, default=1200, help="median")
    parser.add_argument("--output-tokens", type=int, default=400, help="median")
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args()

    given = {field.name: getattr(options, field.name) for field in fields(PlannerLoad)}
    bench = PlannerBench(PlannerLoad(**given))
    start = time.perf_counter()
    bench.warm_up()
    state = bench.scheduler.state
    warm = time.perf_counter() - start
    counters = state.counters
    before = (counters.steps, counters.generation_tokens, counters.prefetched_tokens)
    gc.collect()
    for _ in range(options.steps):
        bench.turn()
    done = [
        now - then
        for now, then in zip(
            (counters.steps, counters.generation_tokens, counters.prefetched_tokens),
            before,
            strict=True,
        )
    ]
    print(f"{platform.python_implementation()} {platform.python_version()}, {platform.machine()}")
    print(f"warm-up {warm:.1f} s; policy {options.policy}; {options.stages} stages")
    print(
        f"{len(state.running)} running with {sum(len(r.table) for r in state.running.values())} "
        f"blocks ({options.device_blocks} device, {state.host_used} of {options.host_blocks} host)"
    )
    print(
        f"per step: {done[1] / done[0]:.0f} tokens, {done[2] / BLOCK_SIZE / done[0]:.0f} blocks "
        "prefetched"
    )
    report(bench, options.steps)
    step_s = sorted(bench.step_s)
    print(
        f"a step: median {1e3 * statistics.median(step_s):.3f} ms, "
        f"99th percentile {1e3 * step_s[len(step_s) * 99 // 100]:.3f} ms, "
        f"{len(state.waiting)} waiting"
    )


if __name__ == "__main__":
    main()
