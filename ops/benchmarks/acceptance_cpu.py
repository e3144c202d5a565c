"""The speed goals on two CPU cores, measured: PipeMax beside vLLM, transformers, the limit
and itself.

    python ops/benchmarks/acceptance_cpu.py LINE [LINE ...] [--json OUT] [--records FILE.jsonl]

    ample         all KV in the pool: two stages against vLLM, and the share of the limit
    capped        the device's KV at 12,320 and 6,080 tokens on both sides, ours with a host pool
    stages        two stages of one thread each against one stage of two
    offload       a device pool of a quarter of the working set against one that holds it all
    vllm          settings of vLLM against each other: which is its best
    transformers  two stages against transformers' continuous batching, 64 requests
    link          the same quarter with a slow link, against what the simulator predicts
    memory        of each process, beside its weights and pools

Lines given together share one start of each engine and the same rounds; `transformers`, `link` and
`memory` run on their own afterwards. How long it takes, with 512 requests, at 800 output tokens/s:
a minute for each contender in each round, so 10 min for `ample` (2 contenders, 5 rounds), 20 min
for `capped` (4), 10 min for `stages` (2) and 5 more for `offload` beside it (1 more); starting vLLM
takes one to two minutes (the first time it compiles), ours 10 s, measuring the limit 30 s.
`vllm`: 9 min with --requests 256 --rounds 3; `transformers`: 5 min; `link`: 5 min; `memory`: 1 min.
In float32 (`--dtype float32`) twice that. --requests and --rounds shorten: time is proportional to
both. What was measured is in --records at once; the same command goes on where it was.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from contenders import Contender, Machine, Records, Series, tell
from process_memory import memory_line

from pipemax.proto.errors import PipemaxError
from pipemax.services.bench.limit import Limit, limit_of
from pipemax.services.bench.limit_command import limit_data, machine_data, machine_lines
from pipemax.services.bench.machine import measure_machine, used_cores
from pipemax.services.bench.model import model_folder
from pipemax.services.bench.model_cost import cost_of, dtype_of
from pipemax.services.bench.outcome import Side, Spread, Throughput, ratio
from pipemax.services.bench.output import surroundings
from pipemax.services.bench.peers import tcmalloc
from pipemax.services.bench.work import lognormal_data
from pipemax.services.machine import usable_cores
from pipemax.stage_worker.model.inspect import inspect_model

CAPS_TOKENS = (12_320, 6_080)
VLLM_BLOCK_SIZE = 32
MEAN_IN, MEAN_OUT, SIGMA = 128.0, 96.0, 0.6
REQUESTS, TRANSFORMERS_REQUESTS = 512, 64
OURS, VLLM = Contender(name="ours"), Contender(name="vllm", engine="vllm")
ONE_STAGE = Contender(name="ours, one stage", stages=1)
QUARTER = Contender(name="ours, a quarter", kv_share=0.25, offloading=True)
TRANSFORMERS = Contender(name="transformers", engine="transformers")
MORE_SEQS = replace(VLLM, name="vllm, 512 sequences", arguments=("max_num_seqs=512",))
GNU_OPENMP = replace(
    VLLM, name="vllm, GNU's OpenMP", environment=(f"LD_PRELOAD={tcmalloc() or ''}",)
)


def capped(contender: Contender, tokens: int) -> Contender:
    """With so many tokens of KV on the device."""
    blocks = tokens // VLLM_BLOCK_SIZE
    arguments = (f"num_gpu_blocks_override={blocks}", f"block_size={VLLM_BLOCK_SIZE}")
    ours = contender.engine == "pipemax"
    return replace(
        contender,
        name=f"{contender.name}, {tokens} tokens",
        kv_tokens=tokens,
        offloading=ours,
        arguments=() if ours else arguments,
    )


@dataclass(frozen=True, slots=True)
class Comparison:
    """A goal: throughput of `ours` over that of `other`; without `other`, over the limit."""

    line: str
    ours: Contender
    other: Contender | None
    least: float | None
    """None: there is no goal, only something to know."""
    aim: float | None = None


COMPARISONS = (
    Comparison("ample", OURS, VLLM, 1.0, 1.25),
    Comparison("ample", OURS, None, 0.65, 0.85),
    *(
        Comparison("capped", capped(OURS, tokens), capped(VLLM, tokens), least, aim)
        for tokens, least, aim in zip(CAPS_TOKENS, (1.1, 1.3), (1.25, 1.6), strict=True)
    ),
    Comparison("stages", OURS, ONE_STAGE, 0.95),
    Comparison("offload", QUARTER, OURS, 0.85),
    Comparison("vllm", MORE_SEQS, VLLM, None),
    Comparison("vllm", GNU_OPENMP, VLLM, None),
    Comparison("transformers", OURS, TRANSFORMERS, 4.0),
)
TOGETHER = ("ample", "capped", "stages", "offload", "vllm")
"""Lines whose contenders run the same requests in the same rounds."""
LINES = (*TOGETHER, "transformers", "link", "memory")


def contenders_of(comparisons: Sequence[Comparison]) -> list[Contender]:
    """Each once; those that are compared stand side by side."""
    found = [one for pair in comparisons for one in (pair.ours, pair.other) if one is not None]
    return list(dict.fromkeys(found))


def compare(
    comparisons: Sequence[Comparison], sides: Mapping[str, Side], limit: Limit | None
) -> list[dict[str, Any]]:
    """Of what was measured: the ratio of each round, and whether the goal is met."""
    found = []
    for one in comparisons:
        ours = sides.get(one.ours.name)
        other = None if one.other is None else sides.get(one.other.name)
        if ours is None or (one.other is not None and other is None):
            continue
        if other is not None:
            spread = ratio(ours, other)
        elif limit is not None:
            spread = Spread(tuple(limit.seconds / seconds for seconds in ours.seconds))
        else:
            continue
        what = "the limit" if one.other is None else one.other.name
        found.append(compared(one.line, f"{one.ours.name} / {what}", spread, one.least, one.aim))
    return found


def compared(
    line: str, what: str, spread: Spread, least: float | None, aim: float | None = None
) -> dict[str, Any]:
    return {
        "line": line,
        "what": what,
        "median": spread.median,
        "least": min(spread.ratios),
        "most": max(spread.ratios),
        "rounds": list(spread.ratios),
        "goal": least,
        "aim": aim,
        "met": None if least is None else spread.median >= least,
    }


def verdict(one: Mapping[str, Any]) -> str:
    aim = "" if one["aim"] is None else f", aim {one['aim']:g}"
    found = (
        f"{one['line']}: {one['what']}: {one['median']:.3f} ({one['least']:.3f} to "
        f"{one['most']:.3f}, {len(one['rounds'])} rounds)"
    )
    if one["goal"] is None:
        return found
    return f"{found}; goal {one['goal']:g}{aim}: {'met' if one['met'] else 'MISSED'}"


def measured_limit(machine: Machine) -> tuple[Limit, dict[str, Any]]:
    info = inspect_model(machine.model, "dummy")
    dtype = dtype_of(machine.dtype, info)
    work = machine.data.round(0)
    cost, matrices = cost_of(machine.model, info, dtype, work)
    cores = used_cores(usable_cores())
    rates = measure_machine(cores, [dtype], matrices, tell, num_layers=info.num_layers)
    tell("\n".join(machine_lines(rates)))
    limit = limit_of(work, cost, rates.rates(dtype))
    tell(f"limit: {limit.seconds:.2f} s, {Throughput.of(work).output_tokens / limit.seconds:.0f} "
         "output tokens/s")  # fmt: skip
    return limit, {
        **limit_data(limit, Throughput.of(work)),
        "machine_rates": machine_data(rates),
    }


def run_series(
    lines: Sequence[str], machine: Machine, options: argparse.Namespace
) -> dict[str, Any]:
    comparisons = [one for one in COMPARISONS if one.line in lines]
    size = Throughput.of(machine.data.round(0))
    limit, about_limit = None, {}
    if any(one.other is None for one in comparisons) and not options.no_limit:
        limit, about_limit = measured_limit(machine)
    key = {
        "commit": commit(),
        "requests": size.num_requests,
        "prompt_tokens": size.prompt_tokens,
        "output_tokens": size.output_tokens,
        "seed": machine.data.seed,
        "dtype": machine.dtype,
        "ours": dict(machine.ours),
        "vllm": list(machine.peer_arguments.get("vllm", ())),
    }
    contenders = contenders_of(comparisons)
    series = Series(contenders, machine, options.rounds, Records(options.records, key))
    sides = series.run()
    verdicts = compare(comparisons, sides, limit)
    return {
        "lines": list(lines),
        **key,
        "rounds": options.rounds,
        "limit": about_limit,
        "contenders": {name: size.data(side) for name, side in sides.items()},
        "failed": series.failed,
        "comparisons": verdicts,
    }


def link_line(options: argparse.Namespace) -> dict[str, Any]:
    """Another model and other requests, for which reading weights is most of a step; see
    `offload_cpu.py`."""
    script = Path(__file__).with_name("offload_cpu.py")
    with tempfile.TemporaryDirectory(prefix="pipemax-bench-") as folder:
        out = Path(folder, "out.json")
        argv = [sys.executable, str(script), "--contenders", "pipemax", "--json", str(out)]
        argv += ["--rounds", str(options.rounds), *(["--quick"] if options.quick else [])]
        subprocess.run(argv, check=True, stdout=sys.stderr)
        found = json.loads(out.read_text())
    simulated_s = found["simulated_s"]["own costs"]["pipemax"]
    rounds = tuple(simulated_s / seconds for seconds in found["pipemax"]["seconds"])
    one = compared("link", "measured / simulated", Spread(rounds), 0.95)
    return {"lines": ["link"], "offload_cpu": found, "comparisons": [one]}


def main() -> None:
    options = parsed()
    started = time.time()
    report: dict[str, Any] = {
        "command": ["python", "ops/benchmarks/acceptance_cpu.py", *sys.argv[1:]],
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "commit": commit(),
        **surroundings(),
        "series": [],
    }
    with model_folder(options.model) as model:
        for lines in groups(options.lines):
            try:
                found = run_group(lines, model, options)
            except (PipemaxError, subprocess.CalledProcessError) as error:
                tell(f"{', '.join(lines)} FAILED: {error}")
                found = {"lines": list(lines), "failed": str(error), "comparisons": []}
            report["series"].append(found)
            report["took_s"] = time.time() - started
            if options.json:
                options.json.write_text(json.dumps(report, indent=1) + "\n")
    for series in report["series"]:
        show(series)


def groups(lines: Sequence[str]) -> list[tuple[str, ...]]:
    """What runs together."""
    together = tuple(line for line in TOGETHER if line in lines)
    alone = [(line,) for line in LINES if line in lines and line not in TOGETHER]
    return ([together] if together else []) + alone


def run_group(lines: Sequence[str], model: Path, options: argparse.Namespace) -> dict[str, Any]:
    if "link" in lines:
        return link_line(options)
    default = TRANSFORMERS_REQUESTS if "transformers" in lines else REQUESTS
    count = options.requests or default
    info = inspect_model(model, "dummy")
    data = lognormal_data(
        count, MEAN_IN, MEAN_OUT, SIGMA, vocab_size=info.vocab_size, seed=options.seed
    )
    machine = Machine(
        model=model,
        dtype=options.dtype,
        data=data,
        in_flight=options.in_flight or count,
        ours=dict(pair(text) for text in options.ours),
        peers={
            name: place
            for name, place in (("vllm", options.vllm), ("transformers", options.transformers))
            if place is not None
        },
        peer_arguments={
            "vllm": [f"max_num_seqs={options.vllm_max_num_seqs}", *options.vllm_arg],
            "transformers": options.transformers_arg,
        },
        peer_environment={"vllm": options.vllm_env},
    )
    if "memory" in lines:
        return memory_line([OURS, QUARTER], machine)
    return run_series(lines, machine, options)


def show(series: Mapping[str, Any]) -> None:
    say("")
    for name, side in series.get("contenders", {}).items():
        each = ", ".join(f"{one:.1f}" for one in side["elapsed_times"])
        rate = side["num_output_tokens"] / statistics.median(side["elapsed_times"])
        say(f"{name:<24} {rate:8.1f} output tokens/s  ({each} s; {side['engine']})")
    if series.get("failed"):
        say(f"FAILED: {series['failed']}")
    for line in series.get("texts", ()):
        say(line)
    for one in series["comparisons"]:
        say(verdict(one))


def say(line: str) -> None:
    print(line, flush=True)


def commit() -> str:
    argv = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return subprocess.run(argv, capture_output=True, text=True, check=False).stdout.strip()


def pair(text: str) -> tuple[str, Any]:
    """NAME=VALUE, the value a number or a truth value where it reads as one."""
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("lines", nargs="+", choices=LINES, metavar="LINE")
    add("--rounds", type=int, default=5)
    add("--requests", type=int, help=f"{REQUESTS}; of transformers {TRANSFORMERS_REQUESTS}")
    add("--in-flight", type=int, help="requests of ours that run at once; default all")
    add("--model", type=Path, help="folder; default: a Llama of 121 M parameters is made")
    add("--dtype", default="auto")
    add("--seed", type=int, default=0, help="of lengths and tokens")
    add("--vllm", type=Path, metavar="DIR", help="its virtual environment")
    add("--vllm-max-num-seqs", type=int, default=256)
    add("--vllm-arg", action="append", default=[], metavar="KEY=VALUE", help="of vllm.LLM")
    add("--vllm-env", action="append", default=[], metavar="NAME=VALUE")
    add("--transformers", type=Path, metavar="DIR", help="its virtual environment; default ours")
    add("--transformers-arg", action="append", default=[], metavar="KEY=VALUE")
    add("--ours", action="append", default=[], metavar="KEY=VALUE", help="of EngineOptions")
    add("--no-limit", action="store_true", help="do not measure the machine")
    add("--quick", action="store_true", help="of link: small requests, one round, to try it out")
    add("--records", type=Path, metavar="FILE", help="JSON lines; is gone on with if it is there")
    add("--json", type=Path, metavar="FILE", help="written after each series")
    options = parser.parse_args()
    needs_vllm = {"ample", "capped", "vllm"} & set(options.lines)
    if needs_vllm and options.vllm is None:
        parser.error(f"{', '.join(sorted(needs_vllm))}: say where vLLM is, --vllm DIR")
    return options


if __name__ == "__main__":
    main()
