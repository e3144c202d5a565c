"""How long a simulated hour of 8 GPUs with 20,000 requests takes on one core.

    python ops/benchmarks/simulate_speed.py [--gpu rtx-3090] [--seconds 3600] [--block-size 64]

Processor seconds, not wall clock, so that other work on the machine does not count. With fewer
simulated seconds the rest of the hour is extrapolated and marked as such: the figure then assumes
that the rest costs what the measured part did.
"""

import argparse
import time

from pipemax.coordinator.policy import DEFAULT_POLICY
from pipemax.services.simulator.command import SimulateFlags, build_spec
from pipemax.services.simulator.world import World

HOUR_S = 3600


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--gpu", default="rtx-3090")
    options.add_argument("--model", default="llama-2-70b")
    options.add_argument("--policy", default=DEFAULT_POLICY)
    options.add_argument("--seconds", type=float, default=HOUR_S)
    options.add_argument("--block-size", type=int, default=64)
    asked = options.parse_args()
    print("| offloading | simulated s | steps | events | finished | CPU s | CPU s per hour |")
    print("|---|---|---|---|---|---|---|")
    for host in ("0", "400GB"):
        spec = build_spec(
            SimulateFlags(
                gpu=asked.gpu,
                count=8,
                model=asked.model,
                kv_offloading_size=host,
                requests=20_000,
                block_size=asked.block_size,
                policy=asked.policy,
                horizon_s=asked.seconds,
            )
        )
        started = time.process_time()
        result = World(spec).run()
        cpu_s = time.process_time() - started
        per_hour = cpu_s * HOUR_S / result.simulated_s
        guess = "" if result.simulated_s >= HOUR_S else " (extrapolated)"
        print(
            f"| {'off' if host == '0' else 'on'} | {result.simulated_s:.0f} | {result.steps} "
            f"| {result.num_events} | {result.finished} | {cpu_s:.1f} | {per_hour:.0f}{guess} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
