"""What monitoring costs: throughput with and without it, alternately, in one run.

    python ops/benchmarks/monitoring_cost.py [--rounds 8] [--device cpu|modelled] [--json OUT]

One system, the same work again and again; every other run is watched by another process that does
all there is at once: scrapes /metrics every five seconds as Prometheus would, asks for /live.json
twice a second as the built-in page does, asks for the status once a second as `status --watch`
does, and records every span and KV copy as `pipemax trace` does. A pair of runs, one watched and
one not, in an order that changes from pair to pair, gives a ratio; stated are their geometric mean
and its standard error, beside the same figures of pairs of which neither is watched: what the
machine's own noise does to the ratio. The watcher takes time of the same cores; on a machine that
has more of them it does not.

`cpu`: a random model of about 100 M parameters on two stages. `modelled`: eight L20 with
Llama-2-70B in real time: little for the machine to do but messages, planning and copies.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from live_system import Lengths, Live, lognormal_lengths, running, versions

from pipemax.client import Client
from pipemax.proto.rundir import METRICS_PORT_FILE, run_dir_of
from pipemax.services.cli.options import EngineOptions
from pipemax.services.trace.collect import collect
from pipemax.services.where import Where

SCRAPE_S, PAGE_S, STATUS_S = 5.0, 0.5, 1.0
GOAL = 0.01


class Watcher:
    """The process that watches, while it is told to."""

    def __init__(self, system: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--watch", system],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._expect("ready")

    def tell(self, word: str) -> None:
        """`on` or `off`; returns when it is so."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{word}\n")
        self._process.stdin.flush()
        self._expect(word)

    def close(self) -> str:
        """What it did, in words."""
        out, _ = self._process.communicate()
        return out.strip()

    def _expect(self, word: str) -> None:
        assert self._process.stdout is not None
        found = self._process.stdout.readline().strip()
        if found != word:
            raise SystemExit(f"the watcher says {found!r}, not {word!r}")


def watch(system: str) -> None:
    """The watcher's side."""
    port = (run_dir_of(system) / METRICS_PORT_FILE).read_text().strip()
    counts = {"scrapes": 0, "pages": 0, "looks": 0, "reports": 0}

    last = 0

    def get(path: str) -> bytes:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", timeout=30) as answer:
            return bytes(answer.read())

    def scrape() -> None:
        get("metrics")
        counts["scrapes"] += 1

    def page() -> None:
        nonlocal last
        last = json.loads(get(f"live.json?after={last}"))["last"] or last
        counts["pages"] += 1

    def again(every_s: float, stop: threading.Event, act: Callable[[], None]) -> None:
        while not stop.wait(every_s):
            act()

    def trace(stop: threading.Event) -> None:
        while not stop.is_set():
            for _ in collect(Where(system), num_stages, 2.0):
                counts["reports"] += 1
                if stop.is_set():
                    break

    with Client(system) as client:
        num_stages = len(client.status().stages)

        def look() -> None:
            client.status()
            counts["looks"] += 1

        print("ready", flush=True)
        stop = threading.Event()
        threads: list[threading.Thread] = []
        for line in sys.stdin:
            word = line.strip()
            if word == "on":
                stop.clear()
                loops = (
                    (SCRAPE_S, scrape),
                    (PAGE_S, page),
                    (STATUS_S, look),
                )
                threads = [
                    threading.Thread(target=again, args=(every_s, stop, act))
                    for every_s, act in loops
                ]
                threads.append(threading.Thread(target=trace, args=(stop,)))
                for thread in threads:
                    thread.start()
            else:
                stop.set()
                for thread in threads:
                    thread.join()
            print(word, flush=True)
        print(json.dumps(counts))


def measure(live: Live, watcher: Watcher, work: list[Lengths], watched: bool) -> float:
    """Output tokens per second."""
    if watched:
        watcher.tell("on")
    began_s = time.perf_counter()
    live.generate(work)
    seconds = time.perf_counter() - began_s
    if watched:
        watcher.tell("off")
        time.sleep(4.0)  # leases of what was recorded end
    return sum(one.output_tokens for one in work) / seconds


def summary(ratios: list[float]) -> tuple[float, float]:
    """Geometric mean and its standard error."""
    logs = [math.log(ratio) for ratio in ratios]
    error = statistics.stdev(logs) / math.sqrt(len(logs)) if len(logs) > 1 else float("nan")
    return math.exp(statistics.fmean(logs)), error


def options_for(device: str, stack: ExitStack) -> EngineOptions:
    if device == "modelled":
        return EngineOptions(
            device="modelled:l20", model="llama-2-70b", pipeline_parallel_size=8, max_model_len=2048
        )
    from pipemax.services.tiny_model import SHAPE_100M, make_demo_model

    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="pipemax-bench-"))
    return EngineOptions(
        model=str(make_demo_model(Path(folder), shape=SHAPE_100M)),
        pipeline_parallel_size=2,
        threads_per_stage=1,
        max_model_len=1024,
        kv_cache_memory_bytes="512MiB",
        kv_offloading_size="256MiB",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=8, help="pairs of runs of each kind")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--device", choices=("cpu", "modelled"), default="cpu")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--watch", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.watch:
        watch(asked.watch)
        return
    work = lognormal_lengths(asked.requests, 128, 96, 0.6, seed=1)
    rates: dict[str, list[float]] = {"watched": [], "not": [], "ratios": [], "noise": []}
    with ExitStack() as stack:
        options = options_for(asked.device, stack)
        live = stack.enter_context(running("monitoring", options))
        watcher = Watcher(live.config.name)
        live.generate(work)  # warm
        for number in range(asked.rounds):
            pair = {w: measure(live, watcher, work, w) for w in (number % 2 == 0, number % 2 == 1)}
            first, second = (measure(live, watcher, work, False) for _ in range(2))
            rates["watched"].append(pair[True])
            rates["not"] += [pair[False], first, second]
            rates["ratios"].append(pair[True] / pair[False])
            rates["noise"].append(first / second)
            print(f"pair {number}: {rates['ratios'][-1]:.4f}, unwatched {first / second:.4f}")
        did = watcher.close()
    report(asked.device, rates, did)
    if asked.json:
        record = {"device": asked.device, "did": did, "versions": versions(), **rates}
        asked.json.write_text(json.dumps(record, indent=1) + "\n")


def report(device: str, rates: dict[str, list[float]], did: str) -> None:
    ratio, error = summary(rates["ratios"])
    noise, noise_error = summary(rates["noise"])
    print(
        f"\n{device}, {os.cpu_count()} cores, output tokens/s: "
        f"{statistics.median(rates['not']):.0f} unwatched, "
        f"{statistics.median(rates['watched']):.0f} watched\n"
        f"watched over unwatched: {ratio:.4f} ± {error:.4f} ({len(rates['ratios'])} pairs); "
        f"unwatched over unwatched: {noise:.4f} ± {noise_error:.4f}\n"
        f"the goal is a cost under {GOAL:.0%}: "
        f"{'met' if 1 - ratio < GOAL else 'missed'}"
        f"{'' if error < GOAL / 2 else ', but the spread is too wide to tell'}\n"
        f"the watcher did {did}"
    )


if __name__ == "__main__":
    main()
