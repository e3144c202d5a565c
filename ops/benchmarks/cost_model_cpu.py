"""How well the cost model predicts the steps of the real system on the CPU.

    python ops/benchmarks/cost_model_cpu.py [--stages 1 2] [--rounds 3] [--json OUT] [--quick]

A random bfloat16 model of about 100 M parameters, two threads in all; 32 requests with lognormal
lengths (mean 128 in, 192 out), end-of-sequence ignored. Once all prompts are computed and 20 more
steps have passed, at least 100 consecutive decode steps are looked at: the errors are the system's
own, `pipemax_step_time_relative_error` on /metrics, each of a step that was predicted before it was
learned from. Requests end meanwhile, so batches shrink while contexts grow. The worst error is
known up to the histogram's buckets.

Every round starts a system of its own, and with it the warm-up sweep. The steps before the window
(all prefill, the first decodes) are reported too: they are predicted from the sweep and each other.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from threading import Thread

from live_system import Live, grown, lognormal_lengths, running, versions

from pipemax.services.cli.options import EngineOptions
from pipemax.services.tiny_model import SHAPE_100M, make_demo_model

THREADS = 2
NUM_REQUESTS = 32
SETTLE_STEPS = 20
WINDOW_STEPS = 100
POLL_S = 0.1
METRIC = "pipemax_step_time_relative_error"
BOUNDS = ("0.01", "0.02", "0.05", "0.08", "0.1", "0.15", "0.2", "0.3", "0.5", "1.0", "+Inf")


def steps(samples: dict[str, float], stage: int) -> int:
    """Steps whose error was counted."""
    return int(samples.get(f'{METRIC}_count{{stage="{stage}"}}', 0))


def summary(window: dict[str, float], stage: int) -> dict[str, float | str]:
    count = steps(window, stage)
    below = {
        bound: window[f'{METRIC}_bucket{{le="{bound}",stage="{stage}"}}'] / count
        for bound in BOUNDS
    }
    worst = next(bound for bound in BOUNDS if below[bound] == 1)
    mean = window[f'{METRIC}_sum{{stage="{stage}"}}'] / count
    return {"steps": count, "below 5 %": below["0.05"], "below 10 %": below["0.1"],
            "mean": mean, "worst below": worst}  # fmt: skip


def watch(live: Live, stages: int, quick: bool) -> tuple[dict[str, float], dict[str, float]]:
    """Runs the work; returns what the metrics grew by before and in the window."""
    work = lognormal_lengths(NUM_REQUESTS, 128, 192, 0.6, seed=1)
    if quick:
        work = work[:8]
    prompt_tokens = sum(lengths.prompt_tokens for lengths in work)
    runner = Thread(target=live.generate, args=(work,), daemon=True)
    start = live.metrics()
    runner.start()

    def until(ready) -> dict[str, float]:  # type: ignore[no-untyped-def]
        while runner.is_alive():
            samples = live.metrics()
            if ready(samples):
                return samples
            time.sleep(POLL_S)
        raise SystemExit("the requests ended before the window did")

    def prompts_done(samples: dict[str, float]) -> bool:
        total = sum(v for k, v in samples.items() if k.startswith("pipemax_prompt_tokens_total"))
        return total >= prompt_tokens

    def at_least(number: int, since: dict[str, float]):  # type: ignore[no-untyped-def]
        return lambda samples: all(
            steps(samples, s) - steps(since, s) >= number for s in range(stages)
        )

    prefilled = until(prompts_done)
    settled = until(at_least(SETTLE_STEPS, prefilled))
    ended = until(at_least(WINDOW_STEPS, settled))
    runner.join()
    return grown(start, settled), grown(settled, ended)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=THREADS, help="of all stages together")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="8 requests, one round")
    options = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory(prefix="pipemax-bench-") as folder:
        make_demo_model(Path(folder), shape=SHAPE_100M)
        for round_number in range(1 if options.quick else options.rounds):
            for stages in options.stages:
                engine = EngineOptions(
                    model=folder,
                    pipeline_parallel_size=stages,
                    kv_cache_memory_bytes="512MiB",
                    kv_offloading_size="256MiB",
                    max_model_len=1024,
                    threads_per_stage=max(1, options.threads // stages),
                )
                with running("bench-cost", engine) as live:
                    before, window = watch(live, stages, options.quick)
                for stage in range(stages):
                    first, then = summary(before, stage), summary(window, stage)
                    results.append(
                        {"round": round_number, "stages": stages, "stage": stage,
                         "before": first, "window": then}
                    )  # fmt: skip
                    print(f"round {round_number}, stage {stage} of {stages}: {line(then)}; "
                          f"before it {line(first)}", flush=True)  # fmt: skip
    if options.json:
        figures = {"results": results, "versions": versions()}
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


def line(part: dict[str, float | str]) -> str:
    return (
        f"{part['steps']} steps, {part['below 5 %']:.0%} of errors below 5 %, "
        f"{part['below 10 %']:.0%} below 10 %, mean {part['mean']:.1%}, "
        f"worst below {part['worst below']}"
    )


if __name__ == "__main__":
    main()
