"""What a step costs the real coordinator process, with modelled stages and a client; the gap
between two steps on a stage; and what coordinator and KV daemon hold in memory.

    python ops/benchmarks/coordinator_at_scale.py [--running 4096] [--waiting 100000] [--json FILE]

Exactly `--running` requests run and `--waiting` wait while `--steps` steps are measured: all are
submitted before, no more are admitted, and from then on the client sends one for each that has
finished. Those that run first have from one to `--output-tokens` tokens to generate, so that from
the beginning as many finish in each step as in the long run, and prompts a quarter as long, for
their steps to be over soon. Costs are CPU time of the whole process (`measuring_coordinator.py`
says what a step's cost is), with `--parts` also by what the loop does.
Memory is without what is shared, which is the pool. `--offload` lets the device pool hold only half
of what those who run come to in the mean.

A gap is the time on one stage from the end of one step's computing to the begin of the next one's,
less what the stage waited for the stage before it, its KV or its plan: what the stage itself takes
between two steps that are there. From the spans of the running system; stages compute for modelled
times, so that with fewer cores than processes gaps hold what the other processes took of the cores.
Hence `--scale`: steps long enough that the cores are not all busy; `cores busy` says how many were.
"""

import argparse
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
from live_system import FIRST_TOKEN_ID, LAST_TOKEN_ID, versions

from pipemax.client import Client, SamplingParams
from pipemax.proto.config import EngineConfig
from pipemax.proto.errors import PipemaxError
from pipemax.proto.messages.ingest import Status
from pipemax.proto.messages.spans import StageSpans, unpack_i64
from pipemax.proto.states import STATES
from pipemax.services.bench.processes import memory_of
from pipemax.services.cli.options import EngineOptions
from pipemax.services.engine_config import build_config
from pipemax.services.launcher.processes import ProcessSpec, system_processes
from pipemax.services.launcher.system import System
from pipemax.services.trace.collect import collect
from pipemax.services.where import Where

NOT_ITS_OWN = frozenset(STATES.index(s) for s in ("wait_plan", "wait_activation", "wait_kv"))
COMPUTE = STATES.index("compute")
BLOCK_SIZE = 16
PATIENCE_S = 600.0
SPANS_S = 5.0
LOOK_EVERY_S = 2.0
MOST_FINISHED = 4096
"""Requests that the client has beyond those that run and wait at a time."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--running", type=int, default=4096)
    parser.add_argument("--waiting", type=int, default=100_000)
    parser.add_argument("--stages", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=400, help="to measure")
    parser.add_argument("--scale", type=float, default=2.0, help="of modelled time")
    parser.add_argument("--policy", default="pipemax")
    parser.add_argument("--offload", action="store_true", help="half of the working set fits")
    parser.add_argument("--parts", action="store_true", help="cost by part; costs more itself")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pipemax-scale-") as folder:
        os.environ["PIPEMAX_RUNTIME_DIR"] = os.environ["PIPEMAX_STATE_DIR"] = folder
        out = Path(folder) / "steps.json"
        seen = run(asked, out)
        figures = {**figures_of(json.loads(out.read_text()), asked), **seen}
    show(figures)
    if asked.json:
        made_on = {"date": time.strftime("%Y-%m-%d"), "python": platform.python_version()}
        named = {name: value for name, value in vars(asked).items() if name != "json"}
        record = {"asked": named, **made_on, **versions(), **figures}
        asked.json.write_text(json.dumps(record, indent=1) + "\n")


def run(asked: argparse.Namespace, out: Path) -> dict[str, Any]:
    """Measures in a system of its own; `out` then holds its steps. Returns what was seen from
    outside of the coordinator."""
    most_tokens = asked.prompt_tokens + asked.output_tokens
    mean_blocks = (asked.prompt_tokens + asked.output_tokens / 2) / BLOCK_SIZE + 1
    most_blocks = -(-most_tokens // BLOCK_SIZE) + 1
    blocks = mean_blocks / 2 if asked.offload else most_blocks
    options = EngineOptions(
        device="modelled:rtx-4090",
        model="llama-2-70b",
        pipeline_parallel_size=asked.stages,
        modelled_time_scale=asked.scale,
        served_model_name="m",
        max_num_seqs=-(-asked.running // asked.stages),
        max_num_batched_tokens=8192,
        max_model_len=most_tokens,
        kv_offloading_size="400GB" if asked.offload else "0",
        policy=asked.policy,
        warm_up_s=0,
    )
    # More than a client may have, and than such a GPU holds.
    beyond = {
        "client_credits": asked.running + asked.waiting,
        "kv_cache_memory_bytes": int(asked.running * blocks * BLOCK_SIZE)
        * token_bytes(asked.stages),
    }
    with measured_system(asked, options, beyond, out) as system:
        work = threading.Thread(target=_submit, args=(asked, system.config.name), daemon=True)
        work.start()
        with Client(system.config.name) as looks:
            _until_all_run(looks, asked)
            where = Where(system.config.name, None, None)
            gaps = gaps_of(collect(where, asked.stages, SPANS_S))
            before, busy_s, begin_s = looks.status(), cores_busy_s(), time.monotonic()
            while (now := looks.status()).stages[-1].steps < before.stages[-1].steps + asked.steps:
                time.sleep(LOOK_EVERY_S)
            busy = (cores_busy_s() - busy_s) / (time.monotonic() - begin_s)
            pids = system.pids()
            return {
                "gap_s": spread([sum(gap.values()) for gap in gaps]),
                "gap_by_state_s": {
                    state: spread([gap.get(state, 0.0) for gap in gaps])
                    for state in sorted({state for gap in gaps for state in gap})
                },
                "cores_busy": busy,
                "finished_per_step": (now.requests_finished - before.requests_finished)
                / (now.stages[-1].steps - before.stages[-1].steps),
                "memory_bytes": {
                    name: memory_of(pids[name]).private_bytes
                    for name in ("coordinator", "kv-daemon")
                },
                "peak_resident_bytes": memory_of(pids["coordinator"]).peak_bytes,
            }


def token_bytes(stages: int) -> int:
    """KV of a token on one stage of llama-2-70b: 80 layers, 8 KV heads of 128, 2 bytes."""
    return 80 // stages * 2 * 8 * 128 * 2


def cores_busy_s() -> float:
    """Seconds that all cores together were not idle, since the machine's start."""
    fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    user, nice, system, _, _, irq, soft_irq = map(int, fields[:7])
    return (user + nice + system + irq + soft_irq) / os.sysconf("SC_CLK_TCK")


@contextmanager
def measured_system(
    asked: argparse.Namespace, options: EngineOptions, beyond: dict[str, int], out: Path
) -> Iterator[System]:
    def processes(config: EngineConfig, run_dir: Path) -> list[ProcessSpec]:
        specs = list(system_processes(config, run_dir))
        script = Path(__file__).with_name("measuring_coordinator.py")
        parts = ("--parts",) if asked.parts else ()
        argv = (sys.executable, str(script), str(out), str(asked.running), *parts)
        specs[0] = replace(specs[0], argv=(*argv, "--run-dir", str(run_dir)))
        return specs

    config = build_config(options, f"scale-{os.getpid()}")
    config = msgspec.structs.replace(config, **beyond)
    with System(config, temporary=True, processes=processes) as system:
        system.wait_ready()
        yield system


def _submit(asked: argparse.Namespace, name: str) -> None:
    draw = random.Random(0)
    tokens = range(FIRST_TOKEN_ID, LAST_TOKEN_ID)
    count = asked.running + asked.waiting + MOST_FINISHED
    lengths = [max(1, asked.prompt_tokens // 4)] * asked.running
    lengths += [asked.prompt_tokens] * (count - asked.running)
    prompts = [draw.choices(tokens, k=length) for length in lengths]
    most = asked.output_tokens
    first = [_sampling(draw.randint(1, most)) for _ in range(asked.running)]
    try:
        with Client(name) as client:
            client.generate(prompts, first + [_sampling(most)] * (count - len(first)))
    except PipemaxError:
        pass  # the system ends when enough was measured


def _sampling(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)


def _until_all_run(client: Client, asked: argparse.Namespace) -> Status:
    """Until all run that may, the others wait, and next to all steps decode."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        status = client.status()
        are_there = (status.requests_running, status.requests_waiting)
        decoding = sum(slot.requests for slot in status.slots if slot.prefill_tokens < 1024)
        if are_there == (asked.running, asked.waiting) and decoding > 0.8 * asked.running:
            return status
        time.sleep(0.5)
    raise SystemExit(f"{status.requests_running} running, {status.requests_waiting} waiting")


def gaps_of(spans: Iterator[Any]) -> list[dict[str, float]]:
    """Seconds by state, of each gap; see the module."""
    gaps: list[dict[str, float]] = []
    begun: dict[int, dict[str, float]] = {}
    for part in spans:
        if not isinstance(part, StageSpans):
            continue
        for state, length_ns in zip(part.states, unpack_i64(part.lengths_ns), strict=True):
            own = begun.get(part.stage)
            if state == COMPUTE:
                if own:
                    gaps.append(own)
                begun[part.stage] = {}
            elif own is not None and state not in NOT_ITS_OWN:
                own[STATES[state]] = own.get(STATES[state], 0.0) + length_ns / 1e9
    return gaps


def figures_of(recorded: dict[str, Any], asked: argparse.Namespace) -> dict[str, Any]:
    """The last steps, as many as asked for."""
    names = recorded["names"]
    columns = dict(zip(names, zip(*recorded["steps"][-asked.steps :], strict=True), strict=True))
    parts = names[names.index("plan_cpu_s") + 1 :]
    return {
        "steps": len(columns["at_s"]),
        "requests_per_step": statistics.mean(columns["requests"]),
        "running": [min(columns["running"]), max(columns["running"])],
        "waiting": [min(columns["waiting"]), max(columns["waiting"])],
        "prefetched_blocks_per_step": statistics.mean(columns["prefetched_blocks"]),
        "step_cpu_s": spread(columns["process_cpu_s"]),
        "loop_cpu_s": spread(columns["thread_cpu_s"]),
        "plan_cpu_s": spread(columns["plan_cpu_s"]),
        "parts_cpu_s": {name: spread(columns[name]) for name in parts},
        "answer_s": spread(columns["answer_s"]),
        "step_wall_s": spread([b - a for a, b in pairwise(columns["at_s"])]),
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values) or [0.0]
    return {
        "mean": statistics.mean(ordered),
        "median": statistics.median(ordered),
        "p99": ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)],
    }


def show(figures: dict[str, Any]) -> None:
    running, waiting = figures["running"], figures["waiting"]
    held = figures["memory_bytes"]
    print(
        f"{figures['steps']} steps of {figures['requests_per_step']:.0f} requests; "
        f"{running[0]} to {running[1]} running, {waiting[0]} to {waiting[1]} waiting, "
        f"{figures['finished_per_step']:.2f} finished and "
        f"{figures['prefetched_blocks_per_step']:.0f} blocks prefetched a step; "
        f"{figures['cores_busy']:.2f} cores busy"
    )
    print(
        f"memory without the pool: coordinator {held['coordinator'] / 2**20:.0f} MiB "
        f"(most ever {figures['peak_resident_bytes'] / 2**20:.0f}), "
        f"daemon {held['kv-daemon'] / 2**20:.0f} MiB"
    )
    print(f"{'ms':28} {'mean':>8} {'median':>8} {'p99':>8}")
    rows = {
        "CPU of a step, process": figures["step_cpu_s"],
        "  its loop's thread": figures["loop_cpu_s"],
        "    planning": figures["plan_cpu_s"],
        **{f"    part: {name}": value for name, value in figures["parts_cpu_s"].items()},
        "tokens to next plan, wall": figures["answer_s"],
        "step to step, wall": figures["step_wall_s"],
        "gap on a stage, wall": figures["gap_s"],
        **{f"  {name}": value for name, value in figures["gap_by_state_s"].items()},
    }
    for name, value in rows.items():
        print(f"{name:28} " + " ".join(f"{1e3 * value[k]:8.3f}" for k in ("mean", "median", "p99")))


if __name__ == "__main__":
    main()
