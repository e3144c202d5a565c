"""What offloading gains on a GPU when memory is short, and what the simulator says it would.

    python ops/benchmarks/offload_cuda.py [--findings OUT] [--rehearse]

An 8B-shaped bfloat16 model with random weights as 2 and as 4 stages, all on one card, which
imitates one of 24 GB: the weights of all stages and the KV pools of all stages are 24 GB together.
(Taken for each stage instead, two stages would have 48 GB, no shortage, and nothing to gain.)
Requests have ShareGPT's mean lengths, 344 in and 237 out, lognormal; all are submitted at once and
generate to their full lengths.

Two contenders, with host memory and without, take the same requests one after the other. Both
systems are up at once where the card has room, which halves the time to start them; the one that
does not run has nothing on the GPU to do. Steady decode is the time in which the middle 60 % of the
output tokens came: it leaves out how the batch fills and how it runs dry.

Then the costs of steps, copies and messages seen in these runs go into the simulator, which runs
the same requests with the same scheduler in virtual time: with one cost model for both contenders
(`common costs`), and with costs of each contender's own steps (`own costs`).
"""

import argparse
import contextlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from gpu_common import (
    engine_options,
    kv_token_bytes,
    run,
    shape_for,
    weights_bytes,
    write_model,
)
from gpu_device import free_bytes
from gpu_findings import FindingsWriter
from live_system import Lengths, Live, lognormal_lengths, running
from measured_costs import Recording, jitter, latencies, measured_system, simulated
from offload_cpu import latency_run

from pipemax.proto.config import EngineConfig
from pipemax.proto.geometry import split_layers
from pipemax.proto.rundir import LOG_DIR, run_dir_of
from pipemax.services.machine import available_memory_bytes
from pipemax.services.tiny_model import ModelShape

CARD_BYTES = 24 * 10**9
"""Weights and KV of the whole pipeline."""
HOST_BYTES = 16 * 10**9
PROCESS_BYTES = 13 * 10**8
"""Of a GPU's memory for each stage beside weights and KV: context, kernels, activations, graphs."""
REQUESTS = 320
SIGMA = 0.8
CONTENDERS = ("off", "on")
WINDOW = (0.2, 0.8)
"""Shares of the output tokens between which decode counts as steady."""
COSTS = ("common costs", "own costs")


@dataclass(frozen=True, slots=True)
class Setting:
    """What both contenders run."""

    shape: ModelShape
    work: list[Lengths]
    stages: int
    kv_bytes: int
    """Of all stages' pools."""
    host_bytes: int
    rehearse: bool


def setting(stages: int, *, rehearse: bool) -> Setting | None:
    """None where the card has no room."""
    shape = shape_for(rehearse)
    if rehearse:
        work = lognormal_lengths(10, 40, 40, 0.4, seed=3)
        need = sum(one.prompt_tokens + one.output_tokens for one in work)
        kv_bytes = need // 4 * kv_token_bytes(shape)
        return Setting(shape, work, stages, kv_bytes, 8 * kv_bytes, rehearse)
    work = lognormal_lengths(REQUESTS, 344, 237, SIGMA, seed=3)
    card = min(CARD_BYTES, free_bytes() - stages * PROCESS_BYTES)
    kv_bytes = card - weights_bytes(shape)
    if kv_bytes < 2 * 10**9:
        return None
    host_bytes = min(HOST_BYTES, available_memory_bytes() // 4)
    return Setting(shape, work, stages, kv_bytes, host_bytes, rehearse)


@contextlib.contextmanager
def contender(name: str, model: Path, given: Setting, out: Path) -> Iterator[Live]:
    longest = max(one.prompt_tokens + one.output_tokens for one in given.work)
    split = split_layers(given.shape.num_layers, given.stages)
    options = engine_options(
        model,
        given.stages,
        rehearse=given.rehearse,
        layer_split=",".join(map(str, split)),
        max_model_len=longest,
        max_num_batched_tokens=2048,
        kv_cache_memory_bytes=str(given.kv_bytes * max(split) // given.shape.num_layers),
        kv_offloading_size=str(given.host_bytes if name == "on" else 0),
    )
    with running(f"bench-{name}-{given.stages}", options, out) as live:
        yield live


def record(live: Live, work: list[Lengths]) -> dict[str, Any]:
    """One measured run. Steps and plans are added once the system has stopped."""
    live.generate([Lengths(64, 4)] * 8)
    idle = latency_run(live)
    before = live.client.status()
    started_s = time.monotonic()
    live.generate(work, seed=1)
    ended_s = time.monotonic()
    return {"idle": idle, "before": before, "after": live.client.status(),
            "span": (started_s, ended_s), "config": live.config}  # fmt: skip


def recording(ran: dict[str, Any], out: Path) -> Recording:
    recorded = json.loads(out.read_text())
    started_s, ended_s = ran["span"]
    return Recording(
        steps=[step for step in recorded["steps"] if started_s <= step[0] <= ended_s],
        plans=[plan for plan in recorded["plans"] if started_s <= plan[0] <= ended_s],
        seconds=ended_s - started_s,
        before=ran["before"],
        after=ran["after"],
        latencies=latencies(recorded, *ran["idle"]),
        config=ran["config"],
    )


@dataclass(frozen=True, slots=True)
class Pinning:
    """Of one stage's part of the host pool."""

    seconds: float
    behind_s: float
    """How much later than its weights the stage had it."""


def pinnings(logs: Path) -> list[Pinning]:
    """As stages tell in their logs; none where nothing is pinned."""
    found = []
    for log in sorted(logs.glob("stage-*.log")):
        text = log.read_text(errors="replace")
        pinned = re.search(r"^(\S+) .* pinned .* of host memory in ([\d.]+) s", text, re.M)
        loaded = re.search(r"^(\S+) .* loaded in [\d.]+ s", text, re.M)
        if pinned and loaded:
            behind_s = (_time_of_day_s(pinned[1]) - _time_of_day_s(loaded[1])) % 86400
            found.append(Pinning(float(pinned[2]), behind_s if behind_s < 43200 else 0.0))
    return found


def _time_of_day_s(stamp: str) -> float:
    """Of `18:12:43.285`."""
    hours, minutes, seconds = stamp.split(":")
    return 3600 * int(hours) + 60 * int(minutes) + float(seconds)


def measure(
    model: Path, given: Setting, folder: Path, found: FindingsWriter
) -> dict[str, Recording]:
    """Both contenders' runs."""
    outs = {name: folder / f"steps-{name}-{given.stages}.json" for name in CONTENDERS}
    each_bytes = CARD_BYTES + given.stages * PROCESS_BYTES
    ran: dict[str, dict[str, Any]] = {}
    if given.rehearse or free_bytes() < len(CONTENDERS) * each_bytes:
        for name in CONTENDERS:
            with contender(name, model, given, outs[name]) as live:
                report_pinning(given, live, found)
                ran[name] = record(live, given.work)
    else:
        with contextlib.ExitStack() as stack:
            systems = [contender(name, model, given, outs[name]) for name in CONTENDERS]
            for name, live in zip(CONTENDERS, enter_all(stack, systems), strict=True):
                report_pinning(given, live, found)
                ran[name] = record(live, given.work)
    return {name: recording(ran[name], outs[name]) for name in CONTENDERS}


def enter_all(
    stack: contextlib.ExitStack, systems: Sequence[contextlib.AbstractContextManager[Live]]
) -> list[Live]:
    """Starts all at the same time. If one fails, the others are left with `stack`."""
    with ThreadPoolExecutor(len(systems)) as threads:
        starting = [threads.submit(system.__enter__) for system in systems]
    for system, started in zip(systems, starting, strict=True):
        if started.exception() is None:
            stack.push(system)
    return [started.result() for started in starting]


def window_rate(points: Sequence[tuple[float, float]]) -> float:
    """Output tokens per second in the middle of a run; 0 if it has none. `points`: seconds, and
    output tokens until then, both rising."""
    total = points[-1][1] if points else 0.0
    first_s, last_s = (reached_s(points, share * total) for share in WINDOW)
    return (WINDOW[1] - WINDOW[0]) * total / (last_s - first_s) if last_s > first_s else 0.0


def reached_s(points: Sequence[tuple[float, float]], tokens: float) -> float:
    """When so many tokens were out, linear between the points."""
    before = points[0] if points else (0.0, 0.0)
    for point in points:
        if point[1] >= tokens:
            if point[1] == before[1]:
                return point[0]
            share = (tokens - before[1]) / (point[1] - before[1])
            return before[0] + share * (point[0] - before[0])
        before = point
    return before[0]


def steady_rate(ran: Recording) -> float:
    """From the last stage's reports."""
    points, tokens = [], 0.0
    for step in ran.steps:
        if step[1] == ran.num_stages - 1:
            tokens += step[2]
            points.append((step[0], tokens))
    return window_rate(points)


class Simulation(msgspec.Struct, frozen=True):
    """What one simulation is to run, for a process of its own."""

    measured: str
    work: list[Lengths]
    config: EngineConfig
    noise: float


def simulate_all(
    runs: dict[str, Recording], given: Setting, folder: Path
) -> dict[str, dict[str, dict[str, float]]]:
    """By costs and contender: simulated seconds and steady rate. All at once, a process each."""
    everything = list(runs.values())
    started = {}
    for name, own in runs.items():
        for costs in COSTS:
            recordings = [own] if costs == "own costs" else everything
            stem = folder / f"{name}-{costs.split()[0]}-{given.stages}"
            system = measured_system(f"{name}, {costs}", [own], recordings, given.shape)
            measured = stem.with_suffix(".measured.json")
            measured.write_text(json.dumps(system, indent=2) + "\n")
            noise = jitter(system, recordings)
            job = Simulation(str(measured), given.work, own.config, noise)
            job_file = stem.with_suffix(".job.json")
            job_file.write_bytes(msgspec.json.encode(job))
            command = [sys.executable, __file__, "--simulate", str(job_file)]
            started[costs, name] = subprocess.Popen(command, stdout=subprocess.PIPE)
    found: dict[str, dict[str, dict[str, float]]] = {costs: {} for costs in COSTS}
    for (costs, name), process in started.items():
        answer, _ = process.communicate()
        if process.returncode != 0:
            raise SystemExit(f"the simulation of {name} with {costs} failed")
        found[costs][name] = json.loads(answer)
    return found


def simulate(job_file: Path) -> None:
    """In a process of its own: prints what came of it."""
    job = msgspec.json.decode(job_file.read_bytes(), type=Simulation)
    result = simulated(Path(job.measured), job.work, job.config, job.noise)
    points = [(sample.at_s, float(sample.generation_tokens)) for sample in result.timeline]
    print(json.dumps({"seconds": result.simulated_s, "steady": window_rate(points)}))


def report_pinning(given: Setting, live: Live, found: FindingsWriter) -> None:
    """A second for 10 GiB is how long readiness may wait for it."""
    ten_gib = given.host_bytes / given.stages / (10 * 2**30)
    logs = run_dir_of(live.config.name) / LOG_DIR
    for stage, pinned in enumerate(pinnings(logs)):
        found.figure(
            f"{given.stages} stages: stage {stage} waits for pinned memory behind its weights",
            pinned.behind_s / ten_gib, "s per 10 GiB", at_most=1.0,
            note=f"pinned in {pinned.seconds / ten_gib:.1f} s per 10 GiB",
        )  # fmt: skip


def report(given: Setting, runs: dict[str, Recording], found: FindingsWriter) -> dict[str, float]:
    """Tells what was measured; returns the ratios, by what they are of."""
    tokens = sum(one.output_tokens for one in given.work)
    head = f"{given.stages} stages, offloading"
    card = (weights_bytes(given.shape) + given.kv_bytes) / 1e9
    steady = {name: steady_rate(ran) for name, ran in runs.items()}
    for name, ran in runs.items():
        note = f"{len(given.work)} requests, weights and KV {card:.3g} GB; {ran.describe()}"
        found.figure(f"{head} {name}: steady decode", steady[name], "output tokens/s")
        found.figure(f"{head} {name}: whole run", tokens / ran.seconds, "output tokens/s",
                     note=note)  # fmt: skip
    ratios = {
        "steady decode": steady["on"] / steady["off"] if steady["off"] else 0.0,
        "whole run": runs["off"].seconds / runs["on"].seconds,
    }
    for what, ratio in ratios.items():
        found.figure(f"{head} on : off, {what}, measured", ratio)
        if not ratio > 0:
            found.fail(f"{head}: no {what} was measured")
    return ratios


def report_predictions(
    given: Setting,
    ratios: dict[str, float],
    predicted: dict[str, dict[str, dict[str, float]]],
    found: FindingsWriter,
) -> None:
    for costs, by_name in predicted.items():
        on, off = by_name["on"], by_name["off"]
        rates = {
            "steady decode": on["steady"] / off["steady"] if off["steady"] else 0.0,
            "whole run": off["seconds"] / on["seconds"],
        }
        for what, rate in rates.items():
            off_by = f"{rate / ratios[what] - 1:+.0%} of the measured" if ratios[what] else ""
            found.figure(
                f"{given.stages} stages, offloading on : off, {what}, simulated with {costs}",
                rate, note=off_by,
            )  # fmt: skip


def part(asked: argparse.Namespace, found: FindingsWriter, folder: Path) -> None:
    for stages in (2,) if asked.rehearse else (2, 4):
        given = setting(stages, rehearse=asked.rehearse)
        if given is None:
            found.skip(f"{stages} stages: the GPU has no room for an 8B model and its KV")
            continue
        model = write_model(folder / "model", given.shape)
        runs = measure(model, given, folder, found)
        ratios = report(given, runs, found)
        report_predictions(given, ratios, simulate_all(runs, given, folder), found)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--simulate"]:
        simulate(Path(sys.argv[2]))
    else:
        sys.exit(run(__doc__, part))
