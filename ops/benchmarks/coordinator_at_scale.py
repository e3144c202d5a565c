"""What a step costs the real coordinator process, with modelled stages and a client; and the gap
between two steps on a stage.

    python ops/benchmarks/coordinator_at_scale.py [--running 4096] [--waiting 100000] [--json FILE]

Requests are many more than run: `--waiting` of them wait, in the coordinator's memory, while as
many steps are measured as `--steps` says. Costs are CPU time of the coordinator's loop, by part
(`measuring_coordinator.py` says what a step's cost is), and its resident memory. `--offload` lets
the device pool hold only a part of the working set.

A gap is the time on one stage from the end of one step's computing to the begin of the next one's,
less what the stage waited for the stage before it, its KV or its plan: what the stage itself takes
between two steps that are there. From the spans of the running system; stages compute for modelled
times, so that with fewer cores than processes gaps hold what the other processes took of the cores.
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
from live_system import versions

from pipemax.client import Client, SamplingParams
from pipemax.proto.config import EngineConfig
from pipemax.proto.errors import PipemaxError
from pipemax.proto.messages.spans import StageSpans, unpack_i64
from pipemax.proto.states import STATES
from pipemax.services.cli.options import EngineOptions
from pipemax.services.engine_config import build_config
from pipemax.services.launcher.processes import ProcessSpec, system_processes
from pipemax.services.launcher.system import System
from pipemax.services.trace.collect import collect
from pipemax.services.where import Where

FACTS = ("at_s", "requests", "running", "waiting", "answer_s", "resident_bytes")
"""Of a step, before its CPU seconds by part."""
NOT_ITS_OWN = frozenset(STATES.index(s) for s in ("wait_plan", "wait_activation", "wait_kv"))
COMPUTE = STATES.index("compute")
PATIENCE_S = 600.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--running", type=int, default=4096)
    parser.add_argument("--waiting", type=int, default=100_000)
    parser.add_argument("--stages", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=400, help="to measure")
    parser.add_argument("--scale", type=float, default=2.0, help="of modelled time")
    parser.add_argument("--offload", action="store_true", help="half of the working set fits")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pipemax-scale-") as folder:
        os.environ["PIPEMAX_RUNTIME_DIR"] = os.environ["PIPEMAX_STATE_DIR"] = folder
        out = Path(folder) / "steps.json"
        gaps_s = run(asked, out)
        figures = figures_of(json.loads(out.read_text()), gaps_s, asked.running, asked.steps)
    show(figures)
    if asked.json:
        made_on = {"date": time.strftime("%Y-%m-%d"), "python": platform.python_version()}
        named = {name: value for name, value in vars(asked).items() if name != "json"}
        record = {"asked": named, **made_on, **versions(), **figures}
        asked.json.write_text(json.dumps(record, indent=1) + "\n")


def run(asked: argparse.Namespace, out: Path) -> list[float]:
    """Measures in a system of its own; `out` then holds its steps. Returns gaps."""
    most_tokens = asked.prompt_tokens + asked.output_tokens
    held_tokens = asked.running * most_tokens // (2 if asked.offload else 1)
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
        warm_up_s=0,
    )
    # More than a client may have, and than such a GPU holds.
    beyond = {
        "client_credits": asked.running + asked.waiting,
        "kv_cache_memory_bytes": held_tokens * token_bytes(asked.stages),
    }
    with measured_system(options, beyond, out) as system:
        work = threading.Thread(target=_submit, args=(asked, system.config.name), daemon=True)
        work.start()
        with Client(system.config.name) as looks:
            before = _wait(looks, asked)
            where = Where(system.config.name, None, None)
            gaps_s = gaps_of(collect(where, asked.stages, 5.0))
            while looks.status().stages[-1].steps < before + asked.steps:
                time.sleep(0.5)
    return gaps_s


def token_bytes(stages: int) -> int:
    """KV of a token on one stage of llama-2-70b: 80 layers, 8 KV heads of 128, 2 bytes."""
    return 80 // stages * 2 * 8 * 128 * 2


@contextmanager
def measured_system(options: EngineOptions, beyond: dict[str, int], out: Path) -> Iterator[System]:
    def processes(config: EngineConfig, run_dir: Path) -> list[ProcessSpec]:
        specs = list(system_processes(config, run_dir))
        script = Path(__file__).with_name("measuring_coordinator.py")
        argv = (sys.executable, str(script), str(out), "--run-dir", str(run_dir))
        specs[0] = replace(specs[0], argv=argv)
        return specs

    config = build_config(options, f"scale-{os.getpid()}")
    config = msgspec.structs.replace(config, **beyond)
    with System(config, temporary=True, processes=processes) as system:
        system.wait_ready()
        yield system


def _submit(asked: argparse.Namespace, name: str) -> None:
    draw = random.Random(0)
    count = asked.running + asked.waiting
    sampling = SamplingParams(temperature=0.0, max_tokens=asked.output_tokens, ignore_eos=True)
    prompts = [
        [draw.randrange(300, 4000) for _ in range(asked.prompt_tokens)] for _ in range(count)
    ]
    try:
        with Client(name) as client:
            client.generate(prompts, [sampling] * count)
    except PipemaxError:
        pass  # the system ends when enough was measured


def _wait(client: Client, asked: argparse.Namespace) -> int:
    """Until all run that can and the others wait. Returns the steps until then."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        status = client.status()
        most = asked.running + asked.waiting
        known = status.requests_running + status.requests_waiting + status.requests_finished
        if known >= most and status.requests_running >= 0.95 * asked.running:
            return status.stages[-1].steps
        time.sleep(0.5)
    raise SystemExit(f"{status.requests_running} running, {status.requests_waiting} waiting")


def gaps_of(spans: Iterator[Any]) -> list[float]:
    """Seconds; see the module."""
    gaps: list[float] = []
    own_ns: dict[int, int | None] = {}
    for part in spans:
        if not isinstance(part, StageSpans):
            continue
        own = own_ns.get(part.stage)
        for state, length_ns in zip(part.states, unpack_i64(part.lengths_ns), strict=True):
            if state == COMPUTE:
                if own is not None:
                    gaps.append(own / 1e9)
                own = 0
            elif own is not None and state not in NOT_ITS_OWN:
                own += length_ns
        own_ns[part.stage] = own
    return [gap for gap in gaps if gap > 0]


def figures_of(
    recorded: dict[str, Any], gaps_s: Sequence[float], running: int, steps: int
) -> dict[str, Any]:
    """The last `steps` in which at least nineteen in twenty of `running` ran."""
    rows = [row for row in recorded["steps"] if row[FACTS.index("running")] >= 0.95 * running]
    rows = rows[-steps:]
    if not rows:
        raise SystemExit("no step with enough requests was seen")
    facts = {name: [row[i] for row in rows] for i, name in enumerate(FACTS)}
    costs = [row[len(FACTS) :] for row in rows]
    return {
        "steps": len(rows),
        "requests_per_step": statistics.mean(facts["requests"]),
        "running": statistics.mean(facts["running"]),
        "waiting": statistics.mean(facts["waiting"]),
        "step_cpu_s": spread([sum(cost) for cost in costs]),
        "answer_s": spread(facts["answer_s"]),
        "parts_cpu_s": {
            name: spread([cost[i] for cost in costs]) for i, name in enumerate(recorded["parts"])
        },
        "step_wall_s": spread([b - a for a, b in pairwise(facts["at_s"])]),
        "resident_bytes": max(facts["resident_bytes"]),
        "gap_s": spread(gaps_s),
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values) or [0.0]
    return {
        "mean": statistics.mean(ordered),
        "median": statistics.median(ordered),
        "p99": ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)],
    }


def show(figures: dict[str, Any]) -> None:
    print(
        f"{figures['steps']} steps of {figures['requests_per_step']:.0f} requests, "
        f"{figures['running']:.0f} running, {figures['waiting']:.0f} waiting; coordinator at most "
        f"{figures['resident_bytes'] / 2**20:.0f} MiB"
    )
    print(f"{'ms':28} {'mean':>8} {'median':>8} {'p99':>8}")
    rows = {
        "CPU of a step": figures["step_cpu_s"],
        **{f"  {name}": value for name, value in figures["parts_cpu_s"].items()},
        "tokens to next plan, wall": figures["answer_s"],
        "step to step, wall": figures["step_wall_s"],
        "gap on a stage, wall": figures["gap_s"],
    }
    for name, value in rows.items():
        print(f"{name:28} " + " ".join(f"{1e3 * value[k]:8.3f}" for k in ("mean", "median", "p99")))


if __name__ == "__main__":
    main()
