"""What planning costs the coordinator: microseconds per event by kind, and milliseconds per step.

    python ops/benchmarks/planner_cost.py [--requests 2000] [--stages 8] [--steps 400] ...

The shipped scheduling core is driven by perfect stages and a perfect KV daemon: every step comes
back, every block is stored, at once and at no cost; only the core's own time is taken. Requests
have lognormal lengths; finished ones are replaced. Measuring starts when as many as asked for run.
"""

import argparse
import gc
import platform
import random
import statistics
import sys
import time
from collections import defaultdict, deque

from pipemax.coordinator.core import Scheduler
from pipemax.coordinator.events import (
    BlocksStored,
    Command,
    Event,
    KvReleased,
    LinkMeasured,
    Resumed,
    StageComputed,
    StepReturned,
    Submitted,
    ToDaemon,
    ToStages,
)
from pipemax.coordinator.policy import DEFAULT_POLICY, make_policy
from pipemax.coordinator.state import SchedulerLimits
from pipemax.proto.messages.control import Release, StepPlan, Store
from pipemax.proto.messages.ingest import SamplingParams
from pipemax.proto.wire import encode

BLOCK_SIZE = 16
BLOCK_BYTES = 2**20
STORED_AT_ONCE = 16
"""Blocks in one report of the daemon."""
STEP_S = 0.05
_WARM_UP_STEPS = 20_000


class Bench:
    """The core, and the least there must be around it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.random = random.Random(0)
        self.scheduler = Scheduler(
            SchedulerLimits(
                block_size=BLOCK_SIZE,
                num_slots=options.stages,
                max_num_seqs=options.max_num_seqs,
                max_num_batched_tokens=options.max_num_batched_tokens,
                max_model_len=32_768,
                eos_token_ids=frozenset({2}),
            ),
            make_policy(options.policy),
        )
        self.plans: deque[StepPlan] = deque()
        self.stores: dict[int, Store] = {}
        self.events: deque[Event] = deque()
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.next_key = 0
        self.steps = 0
        self.tell(
            Resumed(
                1,
                options.device_blocks,
                options.host_blocks,
                [BLOCK_BYTES] * options.stages,
                device_kept=False,
                host_kept=False,
            )
        )

    def tell(self, event: Event) -> None:
        start = time.thread_time()
        commands = self.scheduler.handle(event, start)
        self.seconds[type(event).__name__].append(time.thread_time() - start)
        for command in commands:
            self._carry_out(command)

    def submit(self) -> None:
        draw = self.random
        prompt = [5] * min(16_000, max(16, int(draw.lognormvariate(7.1, 0.6))))
        outputs = min(4_000, max(16, int(draw.lognormvariate(6.0, 0.6))))
        sampling = SamplingParams(max_tokens=outputs, ignore_eos=True)
        self.tell(Submitted(self.next_key, prompt, sampling, seed=0))
        self.next_key += 1

    def turn(self) -> None:
        """The oldest step comes back, and what the daemon has to say about it."""
        plan = self.plans.popleft()
        self.steps += 1
        for stage in range(self.options.stages):
            self.tell(StageComputed(stage, plan.step, STEP_S))
        self.tell(StepReturned(plan.step, [5] * len(plan.sample)))
        store = self.stores.pop(plan.step, None)
        moves = store.blocks if store else ()
        for first in range(0, len(moves), STORED_AT_ONCE):
            piece = moves[first : first + STORED_AT_ONCE]
            self.tell(BlocksStored([m.request for m in piece], [m.index for m in piece]))
        while self.events:
            self.tell(self.events.popleft())
        if self.steps % 8 == 0:
            stages = self.options.stages
            load_bytes = int(self.options.link_blocks * BLOCK_BYTES / STEP_S)
            self.tell(LinkMeasured([load_bytes] * stages, [1.0] * stages))
        while len(self.scheduler.state.waiting) < 8:
            self.submit()

    def _carry_out(self, command: Command) -> None:
        match command:
            case ToStages(plan):
                self.plans.append(plan)
                self._encode(plan)
            case ToDaemon(Store() as store):
                self.stores[store.after] = store
                self._encode(store)
            case ToDaemon(Release() as release):
                self.events.append(KvReleased(release.requests))
            case ToDaemon(message):
                self._encode(message)

    def _encode(self, message: object) -> None:
        start = time.thread_time()
        encode(message)  # type: ignore[arg-type]
        self.seconds[f"encode {type(message).__name__}"].append(time.thread_time() - start)


def warm_up(bench: Bench) -> None:
    """Until as many requests as asked for run and all of them decode."""
    state = bench.scheduler.state
    for _ in range(_WARM_UP_STEPS):
        if len(state.running) >= bench.options.requests:
            return
        bench.turn()
    sys.exit(f"only {len(state.running)} requests fit; lower --requests or raise the pools")


def report(bench: Bench, steps: int) -> None:
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
    parser.add_argument("--stages", type=int, default=8)
    parser.add_argument("--device-blocks", type=int, default=230_000)
    parser.add_argument("--host-blocks", type=int, default=200_000)
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--max-num-batched-tokens", type=int, default=4096)
    parser.add_argument("--link-blocks", type=float, default=2000, help="per step")
    parser.add_argument("--policy", default=DEFAULT_POLICY)
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args()

    bench = Bench(options)
    start = time.perf_counter()
    while len(bench.scheduler.state.waiting) + len(bench.scheduler.state.running) < 16:
        bench.submit()
    warm_up(bench)
    state = bench.scheduler.state
    warm = time.perf_counter() - start
    bench.seconds.clear()
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


if __name__ == "__main__":
    main()
