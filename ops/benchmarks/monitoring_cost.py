"""What monitoring costs: one system under steady load, watched and not watched in turns.

    python ops/benchmarks/monitoring_cost.py [--pairs 24] [--window-s 3] [--json OUT]
                                             [--device cpu|modelled] [--watch scrape,status,page]

A client keeps the system busy from beginning to end. Another process watches it, in every other
window, as is done all day: it scrapes /metrics as Prometheus would (every 5 s), asks for the
status as `status --watch` does (every second) and for /live.json as the built-in page does (twice
a second), for which the stages record every span; with `trace` in `--watch` it records spans and
copies as `pipemax trace` does, too. Windows come as off on, on off, off on: what drifts slowly
falls out. Each time it is switched on it looks at once, so it looks rather more often than said.
Where spans are recorded, the stages go on doing so for some seconds after the last look; that time
is in no window.

Two answers, each a ratio watched over unwatched of neighbouring windows, as geometric mean with the
95 % interval of a bootstrap over pairs:

- output tokens per second;
- output tokens per CPU second of all processes, the watcher's and the client's among them. Where
  the cores are busy this is the same, and far less is blurred by what else the machine does;
  where they are not, nobody has to pay for it with tokens, and it is above what monitoring costs.

And what one look costs, in CPU time of the coordinator and of all processes, by looking again and
again when the load has ended; times the looks per second it is a share of a core, without noise.

`cpu`: a random model of about 100 M parameters on two stages, 32 requests at a time, so that steps
are short and there is much to plan and to count. `modelled`: eight L20 with Llama-2-70B in real
time: little for the machine to do but messages, planning and copies.
"""

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from live_system import FIRST_TOKEN_ID, LAST_TOKEN_ID, Live, running, versions
from monitoring_watcher import EVERY_S, RECORDING, Looks

from pipemax.client import Client, SamplingParams
from pipemax.coordinator.live_spans import WANTED_S
from pipemax.coordinator.span_watch import LEASE_S
from pipemax.services.cli.options import EngineOptions

GOAL = 0.01
WARM_UP_S = 15.0
SETTLE_S = 0.3
"""After each change, until it counts."""
TAIL_S = WANTED_S + LEASE_S + 0.5
"""So long spans are recorded after the last look."""
PROMPT_TOKENS = 8
OUTPUT_TOKENS = (128, 896)
"""Evenly between these. Requests begin and end all the time, and prompts are short: so one step is
like another."""
MAX_REQUESTS = 50_000
LOOKS = 200
"""Of each kind, for what one costs."""


@dataclass(frozen=True, slots=True)
class Window:
    """A stretch of time in which the system was watched or was not."""

    watched: bool
    seconds: float
    tokens: int
    cpu_s: dict[str, float]
    """By process."""

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds

    @property
    def tokens_per_cpu_s(self) -> float:
        return self.tokens / sum(self.cpu_s.values())


class Meter:
    """Reads tokens and CPU times of a running system, in the same way whether it is watched."""

    def __init__(self, live: Live, others: dict[str, int]) -> None:
        """others: process ids of the client and the watcher, by name."""
        self._client = live.client
        self._pids = _system_processes() | others

    def cpu_s(self) -> dict[str, float]:
        return {name: _cpu_s(pid) for name, pid in self._pids.items()}

    def window(self, watched: bool, seconds: float) -> Window:
        tokens, cpu_s, began_s = self._read()
        time.sleep(seconds)
        tokens_then, cpu_s_then, ended_s = self._read()
        if tokens_then == tokens:
            raise SystemExit("no tokens in a whole window: has the load ended?")
        spent_s = {name: cpu_s_then[name] - cpu_s[name] for name in cpu_s}
        return Window(watched, ended_s - began_s, tokens_then - tokens, spent_s)

    def _read(self) -> tuple[int, dict[str, float], float]:
        tokens = self._client.status().generation_tokens
        return tokens, self.cpu_s(), time.perf_counter()


def _system_processes() -> dict[str, int]:
    """Our children that are processes of the system, by the names they give themselves."""
    found = {}
    for task in Path("/proc/self/task").iterdir():
        for pid in (task / "children").read_text().split():
            name = Path(f"/proc/{pid}/comm").read_text().strip()
            if name.startswith("pm-"):
                found[name.removeprefix("pm-")] = int(pid)
    if "coordinator" not in found:
        raise SystemExit(f"no coordinator among {sorted(found)}")
    return found


def _cpu_s(pid: int) -> float:
    """User and system time of a process, to the nanosecond."""
    clock = (~pid << 3) | 2  # the kernel's number of a process's CPU-time clock
    return time.clock_gettime(clock)


class Watcher:
    """The process that watches while it is told to."""

    def __init__(self, system: str, what: Sequence[str]) -> None:
        script = Path(__file__).with_name("monitoring_watcher.py")
        self._process = subprocess.Popen(
            [sys.executable, str(script), system, *what],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.pid = self._process.pid
        self._expect("ready")

    def tell(self, word: str) -> None:
        """`on` or `off`; returns when it is so."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{word}\n")
        self._process.stdin.flush()
        self._expect(word)

    def close(self) -> dict[str, float]:
        """Looks of each kind per second watched."""
        out, _ = self._process.communicate()
        return dict(json.loads(out))

    def _expect(self, word: str) -> None:
        assert self._process.stdout is not None
        found = self._process.stdout.readline().strip()
        if found != word:
            raise SystemExit(f"the watcher says {found!r}, not {word!r}")


def load(system: str) -> None:
    """The client's side: far more requests than will be run."""
    draw = random.Random(1)
    tokens = range(FIRST_TOKEN_ID, LAST_TOKEN_ID)
    prompts = [draw.choices(tokens, k=PROMPT_TOKENS) for _ in range(MAX_REQUESTS)]
    sampling = [
        SamplingParams(temperature=0.0, max_tokens=draw.randint(*OUTPUT_TOKENS), ignore_eos=True)
        for _ in range(MAX_REQUESTS)
    ]
    with Client(system) as client:
        for completion in client.stream(prompts, sampling):
            if completion.error is not None:
                raise SystemExit(f"a request failed: {completion.error}")


@contextmanager
def under_load(system: str) -> Iterator[int]:
    """The client's process id. Its requests are cancelled at the end, as it is gone."""
    process = subprocess.Popen([sys.executable, __file__, "--load", system])
    try:
        yield process.pid
        if process.poll() is not None:
            raise SystemExit("the load ended before the measurement")
    finally:
        process.kill()
        process.wait()


def windows(
    meter: Meter, watcher: Watcher, pairs: int, seconds: float, tail_s: float
) -> Iterator[tuple[Window, Window]]:
    """(unwatched, watched), in an order that changes from pair to pair."""
    is_on = False
    for number in range(pairs):
        pair = {}
        for watched in (False, True) if number % 2 == 0 else (True, False):
            if watched != is_on:
                watcher.tell("on" if watched else "off")
                time.sleep(SETTLE_S if watched else tail_s)
                is_on = watched
            pair[watched] = meter.window(watched, seconds)
        yield pair[False], pair[True]
    if is_on:
        watcher.tell("off")


def ratio_with_interval(ratios: Sequence[float]) -> tuple[float, float, float]:
    """Geometric mean and the 95 % interval of a bootstrap (percentiles of 10,000 resamples)."""
    logs = [math.log(ratio) for ratio in ratios]
    draw = random.Random(0)
    means = sorted(statistics.fmean(draw.choices(logs, k=len(logs))) for _ in range(10_000))
    return math.exp(statistics.fmean(logs)), math.exp(means[249]), math.exp(means[9749])


def cost_of_looks(meter: Meter, looks: Looks, what: Sequence[str]) -> dict[str, dict[str, float]]:
    """CPU milliseconds that one look costs the coordinator, and all processes of the system, beyond
    what they do unasked. The process that looks is this one and does not count."""
    acts: dict[str, Callable[[], None]] = {
        "scrape": looks.scrape, "status": looks.status, "page": looks.page
    }  # fmt: skip
    found = {}
    for name in what:
        if name not in acts:
            continue
        before, began_s = meter.cpu_s(), time.perf_counter()
        for _ in range(LOOKS):
            acts[name]()
        after, took_s = meter.cpu_s(), time.perf_counter() - began_s
        time.sleep(TAIL_S if name in RECORDING else SETTLE_S)
        idle = meter.cpu_s()
        time.sleep(2.0)
        idle_share = {who: (now_s - idle[who]) / 2.0 for who, now_s in meter.cpu_s().items()}
        spent_ms = {
            who: (after[who] - before[who] - idle_share[who] * took_s) / LOOKS * 1e3
            for who in before
        }
        found[name] = {"coordinator_ms": spent_ms["coordinator"], "all_ms": sum(spent_ms.values())}
    return found


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
        max_num_seqs=32,
        kv_cache_memory_bytes="512MiB",
        kv_offloading_size="256MiB",
    )


def measure(asked: argparse.Namespace, what: Sequence[str]) -> dict[str, Any]:
    with ExitStack() as stack:
        live = stack.enter_context(running("monitoring", options_for(asked.device, stack)))
        watcher = Watcher(live.config.name, what)
        pairs = []
        tail_s = TAIL_S if any(name in RECORDING for name in what) else SETTLE_S
        with under_load(live.config.name) as client_pid:
            meter = Meter(live, {"client": client_pid, "watcher": watcher.pid})
            time.sleep(WARM_UP_S)
            for unwatched, watched in windows(meter, watcher, asked.pairs, asked.window_s, tail_s):
                pairs.append((unwatched, watched))
                print(
                    f"pair {len(pairs)}: {watched.tokens_per_s / unwatched.tokens_per_s:.4f} "
                    f"in wall time, {watched.tokens_per_cpu_s / unwatched.tokens_per_cpu_s:.4f} "
                    "in CPU time", flush=True,
                )  # fmt: skip
        per_second = watcher.close()
        _wait_until_idle(live)
        looks = Looks(live.config.name)
        try:
            costs = cost_of_looks(Meter(live, {}), looks, what)
        finally:
            looks.close()
    return {
        "device": asked.device,
        "watched": {name: EVERY_S.get(name) for name in what},
        "looks_per_second": per_second,
        "cost_of_a_look": costs,
        "versions": versions(),
        "pairs": [[asdict(window) for window in pair] for pair in pairs],
        **answers(pairs),
    }


def _wait_until_idle(live: Live) -> None:
    while live.client.status().requests_running:
        time.sleep(0.1)
    time.sleep(TAIL_S)


def answers(pairs: Sequence[tuple[Window, Window]]) -> dict[str, Any]:
    def compare(of: Callable[[Window], float]) -> dict[str, Any]:
        ratio, low, high = ratio_with_interval([of(on) / of(off) for off, on in pairs])
        return {
            "unwatched": statistics.median(of(off) for off, _ in pairs),
            "watched": statistics.median(of(on) for _, on in pairs),
            "ratio": ratio,
            "interval": [low, high],
        }

    def share(name: str, which: int) -> float:
        chosen = [pair[which] for pair in pairs]
        spent_s = sum(window.cpu_s[name] for window in chosen)
        return spent_s / sum(window.seconds for window in chosen)

    names = pairs[0][0].cpu_s
    return {
        "tokens_per_s": compare(lambda window: window.tokens_per_s),
        "tokens_per_cpu_s": compare(lambda window: window.tokens_per_cpu_s),
        "share_of_a_core": {
            name: {"unwatched": share(name, 0), "watched": share(name, 1)} for name in names
        },
    }


def report(found: dict[str, Any]) -> None:
    print(f"\n{found['device']}, {os.cpu_count()} cores, {len(found['pairs'])} pairs of windows")
    for key, unit in (("tokens_per_s", "second"), ("tokens_per_cpu_s", "CPU second")):
        one = found[key]
        low, high = one["interval"]
        cost = 1 - one["ratio"]
        verdict = "met" if cost < GOAL else "missed"
        told = "" if 1 - low < GOAL or 1 - high > GOAL else ", but the interval holds both answers"
        print(
            f"output tokens per {unit}: {one['unwatched']:.1f} unwatched, {one['watched']:.1f} "
            f"watched; ratio {one['ratio']:.4f}, 95 % interval {low:.4f} to {high:.4f}: "
            f"a cost under {GOAL:.0%} is {verdict}{told}"
        )
    print("share of a core, unwatched and watched:")
    for name, share in found["share_of_a_core"].items():
        print(f"  {name:14} {share['unwatched']:7.2%} {share['watched']:7.2%}")
    print("a look, CPU ms of the coordinator and of the whole system; looks per second; cores:")
    for name, cost in found["cost_of_a_look"].items():
        rate = found["looks_per_second"][name]
        print(
            f"  {name:8} {cost['coordinator_ms']:7.3f} {cost['all_ms']:7.3f} {rate:6.2f} "
            f"{rate * cost['all_ms'] / 1e3:8.3%}"
        )
    together = sum(
        found["looks_per_second"][name] * cost["all_ms"] / 1e3
        for name, cost in found["cost_of_a_look"].items()
    )
    print(
        f"together {together:.3%} of a core: {together / (os.cpu_count() or 1):.3%} of this machine"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=24, help="of windows")
    parser.add_argument("--window-s", type=float, default=3.0)
    parser.add_argument("--device", choices=("cpu", "modelled"), default="cpu")
    parser.add_argument(
        "--watch", default="scrape,status,page", help="what is done, of scrape,status,page,trace"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--load", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.load:
        load(asked.load)
        return
    what = asked.watch.split(",")
    if unknown := set(what) - {*EVERY_S, "trace"}:
        parser.error(f"--watch {asked.watch}: no {sorted(unknown)}")
    found = measure(asked, what)
    report(found)
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
