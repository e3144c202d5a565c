"""How throughput grows: over the batch, the context, stages and waiting requests; with the limit.

    python ops/benchmarks/scaling_cpu.py [SWEEP ...] [--repeat 3] [--out ops/benchmarks/results]

    batch     1 to 512 requests at once, 32 tokens in and 48 out; two stages
    context   8 requests with prompts of 64 to 4,096 tokens, 32 out; two stages
    stages    1 to 4 of them on the same cores; 128 requests, 32 in and 48 out
    waiting   0 to 3,584 requests wait while 64 run, 32 in and 32 out; two stages

Each point is the median of --repeat runs with prompts of their own; what is drawn beside it is the
limit of the same requests on this machine (see `pipemax bench limit`), measured in the same run.
Written are `scaling-cpu.md` (tables), `scaling-cpu.json` and a picture of each sweep. With
--repeat 3, at 800 output tokens/s: batch 3 min, context 2 min, stages 2 min, waiting 2 min.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from acceptance_cpu import commit, pair
from contenders import Contender, Machine, started, tell
from line_chart import Line, draw

from pipemax.client import SamplingParams
from pipemax.services.bench.engines import OurEngine, warm_up_work
from pipemax.services.bench.limit import DecoderCost, MachineRates, limit_of
from pipemax.services.bench.limit_command import machine_data
from pipemax.services.bench.machine import measure_machine, used_cores
from pipemax.services.bench.model import SHAPE_121M, model_folder
from pipemax.services.bench.model_cost import cost_of, dtype_of
from pipemax.services.bench.output import surroundings
from pipemax.services.bench.work import LognormalData, Work, lognormal_data
from pipemax.services.machine import usable_cores
from pipemax.stage_worker.model.inspect import inspect_model

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
CONTEXTS = (64, 128, 256, 512, 1024, 2048, 4096)
STAGES = (1, 2, 3, 4)
WAITING = (0, 128, 512, 1024, 2048, 3584)
_RUNNING, _FIRST, _LAST = 64, 64, 320
"""Requests that run while others wait, and between which completions time is taken: before and
after, as many run."""


@dataclass(slots=True)
class Point:
    """One place of a sweep."""

    x: int
    requests: int
    prompt_tokens: int
    output_tokens: int
    """Of all requests that are timed, together."""
    limit_s: float
    seconds: list[float] = field(default_factory=list)

    @property
    def data(self) -> dict[str, Any]:
        median_s = statistics.median(self.seconds)
        return {
            "x": self.x,
            "requests": self.requests,
            "seconds": self.seconds,
            "output_tokens_per_s": self.output_tokens / median_s,
            "least": self.output_tokens / max(self.seconds),
            "most": self.output_tokens / min(self.seconds),
            "total_tokens_per_s": (self.prompt_tokens + self.output_tokens) / median_s,
            "limit_output_tokens_per_s": self.output_tokens / self.limit_s,
            "share_of_limit": self.limit_s / median_s,
        }


@dataclass(frozen=True, slots=True)
class Bench:
    """What all sweeps have in common."""

    model: Path
    vocab_size: int
    cost: DecoderCost
    rates: MachineRates
    options: argparse.Namespace

    def data(self, requests: int, prompt: int, output: int) -> LognormalData:
        return lognormal_data(
            requests, prompt, output, 0.0, vocab_size=self.vocab_size, seed=self.options.seed
        )

    def places(self, all_of: Sequence[int]) -> list[int]:
        most = self.options.most
        return [one for one in all_of if most is None or one <= most]

    def machine(self, data: LognormalData, in_flight: int) -> Machine:
        return Machine(
            model=self.model,
            data=data,
            in_flight=in_flight,
            ours=dict(pair(text) for text in self.options.ours),
        )

    def limit_s(self, work: Work) -> float:
        return limit_of(work, self.cost, self.rates).seconds

    def point(self, x: int, work: Work) -> Point:
        prompt = sum(len(one.prompt_token_ids) for one in work)
        output = sum(one.output_tokens for one in work)
        return Point(x, len(work), prompt, output, self.limit_s(work))

    def measure(self, x: int, engine: OurEngine, data: LognormalData) -> Point:
        point = self.point(x, data.round(0))
        for number in range(self.options.repeat):
            point.seconds.append(engine.run(data.round(1000 * x + number)))
        tell_point(point)
        return point


def tell_point(point: Point) -> None:
    found = point.data
    tell(
        f"{time.strftime('%H:%M:%S')}  {point.x:>6}  {found['output_tokens_per_s']:8.1f} output "
        f"tokens/s, {found['share_of_limit']:.0%} of the limit"
    )


def ours(contender: Contender, machine: Machine) -> Any:
    tell(f"starting {contender.name}")
    return started(contender, machine)


def batches(bench: Bench) -> Iterator[Point]:
    most = bench.data(max(bench.places(BATCHES)), 32, 48)
    with ours(Contender(name="two stages"), bench.machine(most, max(BATCHES))) as engine:
        engine.run(warm_up_work(most.round(0)))
        for count in bench.places(BATCHES):
            yield bench.measure(count, engine, bench.data(count, 32, 48))


def contexts(bench: Bench) -> Iterator[Point]:
    most = bench.data(8, max(CONTEXTS), 32)
    with ours(Contender(name="two stages"), bench.machine(most, 8)) as engine:
        engine.run(warm_up_work(most.round(0)))
        for tokens in bench.places(CONTEXTS):
            yield bench.measure(tokens, engine, bench.data(8, tokens, 32))


def stages(bench: Bench) -> Iterator[Point]:
    data = bench.data(128, 32, 48)
    for count in bench.places(STAGES):
        contender = Contender(name=f"{count} stages", stages=count)
        with ours(contender, bench.machine(data, 128)) as engine:
            engine.run(warm_up_work(data.round(0)))
            yield bench.measure(count, engine, data)


def waiting(bench: Bench) -> Iterator[Point]:
    """The pool holds those that run and no more, so that the others wait."""
    running = bench.data(_RUNNING, 32, 32)
    machine = bench.machine(running, _RUNNING)
    timed = bench.data(_LAST - _FIRST, 32, 32).round(0)
    with ours(Contender(name="two stages"), machine) as engine:
        engine.run(warm_up_work(running.round(0)))
        for count in bench.places(WAITING):
            point = bench.point(count, timed)
            point.limit_s = limit_of(timed, bench.cost, bench.rates, _RUNNING).seconds
            for number in range(bench.options.repeat):
                work = bench.data(_LAST + _RUNNING + count, 32, 32).round(1000 * count + number)
                point.seconds.append(in_the_middle_s(engine, work))
            tell_point(point)
            yield point


def in_the_middle_s(engine: OurEngine, work: Work) -> float:
    """Between the completions _FIRST and _LAST; then the others are cancelled."""
    prompts = [one.prompt_token_ids for one in work]
    sampling = [
        SamplingParams(temperature=0.0, max_tokens=one.output_tokens, ignore_eos=True)
        for one in work
    ]
    completions = engine.client.stream(prompts, sampling)
    for count, completion in enumerate(completions, 1):
        if completion.error is not None:
            raise SystemExit(f"a request failed: {completion.error}")
        if count == _FIRST:
            started_s = time.perf_counter()
        if count == _LAST:
            seconds = time.perf_counter() - started_s
            break
    completions.close()  # type: ignore[attr-defined] # a generator: it cancels what is left
    while engine.client.status().requests_running or engine.client.status().requests_waiting:
        time.sleep(0.05)
    return seconds


@dataclass(frozen=True, slots=True)
class Sweep:
    """How it is measured and shown."""

    run: Callable[[Bench], Iterator[Point]]
    x_label: str
    rate: str = "output"
    """Of which tokens the picture is."""
    logarithmic: bool = False


SWEEPS = {
    "batch": Sweep(batches, "requests at once", logarithmic=True),
    "context": Sweep(contexts, "prompt tokens of each of 8 requests", rate="total"),
    "stages": Sweep(stages, "stages on the same cores"),
    "waiting": Sweep(waiting, "requests that wait while 64 run (plus 1)"),
}


def main() -> None:
    options = parsed()
    report: dict[str, Any] = {
        "command": ["python", "ops/benchmarks/scaling_cpu.py", *sys.argv[1:]],
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "commit": commit(),
        **surroundings(),
        "sweeps": {},
    }
    shape = replace(SHAPE_121M, max_position_embeddings=2 * max(CONTEXTS))
    with model_folder(options.model, shape) as model:
        bench, report["machine_rates"] = opened(model, options)
        for name in options.sweeps or SWEEPS:
            tell(f"sweep {name}")
            report["sweeps"][name] = [point.data for point in SWEEPS[name].run(bench)]
            write(report, options.out)


def opened(model: Path, options: argparse.Namespace) -> tuple[Bench, dict[str, Any]]:
    """And the machine's rates, measured before anything else runs."""
    info = inspect_model(model, "dummy")
    dtype = dtype_of("auto", info)
    work = lognormal_data(
        1, max(CONTEXTS), 32, 0.0, vocab_size=info.vocab_size, seed=options.seed
    ).round(0)
    cost, matrices = cost_of(model, info, dtype, work)
    cores = used_cores(usable_cores())
    machine = measure_machine(cores, [dtype], matrices, tell, num_layers=info.num_layers)
    bench = Bench(model, info.vocab_size, cost, machine.rates(dtype), options)
    return bench, machine_data(machine)


def write(report: dict[str, Any], folder: Path) -> None:
    """JSON, tables and pictures of the sweeps that are done."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scaling-cpu.json").write_text(json.dumps(report, indent=1) + "\n")
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [
        "# How throughput grows, on CPU cores",
        "",
        f"{report['date']}, `{' '.join(report['command'])}`, commit {report['commit']}, "
        f"{versions}; {report['machine']['cores']} cores.",
    ]
    for name, points in report["sweeps"].items():
        lines += ["", f"## {name}: {SWEEPS[name].x_label}", "", *table(name, points)]
        (folder / f"scaling-cpu-{name}.svg").write_text(picture(name, points))
    (folder / "scaling-cpu.md").write_text("\n".join(lines) + "\n")


def table(name: str, points: Sequence[dict[str, Any]]) -> list[str]:
    lines = [
        f"| {name} | output tokens/s, median | least to most | total tokens/s | limit, output "
        "tokens/s | share of the limit |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {one['x']:,} | {one['output_tokens_per_s']:.1f} | {one['least']:.1f} to "
        f"{one['most']:.1f} | {one['total_tokens_per_s']:.0f} | "
        f"{one['limit_output_tokens_per_s']:.0f} | {one['share_of_limit']:.0%} |"
        for one in points
    ]
    return [*lines, "", f"![{name}](scaling-cpu-{name}.svg)"]


def picture(name: str, points: Sequence[dict[str, Any]]) -> str:
    """Of output tokens, or of all."""
    sweep = SWEEPS[name]
    factor = [
        one["total_tokens_per_s"] / one["output_tokens_per_s"] if sweep.rate == "total" else 1.0
        for one in points
    ]
    first = 1 if min(one["x"] for one in points) == 0 else 0  # the axis is logarithmic
    x = [one["x"] + first for one in points]

    def values(key: str) -> list[float]:
        return [one[key] * more for one, more in zip(points, factor, strict=True)]

    measured = Line(
        "PipeMax",
        list(zip(x, values("output_tokens_per_s"), strict=True)),
        spread=list(zip(values("least"), values("most"), strict=True)),
    )
    limit = Line(
        "limit of the machine",
        list(zip(x, values("limit_output_tokens_per_s"), strict=True)),
        dashed=True,
    )
    return draw(
        f"Throughput over {name}",
        sweep.x_label,
        f"{sweep.rate} tokens/s",
        [measured, limit],
        logarithmic=sweep.logarithmic,
    )


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("sweeps", nargs="*", metavar="SWEEP", help=f"of {', '.join(SWEEPS)}; default all")
    add("--repeat", type=int, default=3)
    add("--model", type=Path, help="folder; default: a Llama of 121 M parameters is made")
    add("--seed", type=int, default=0, help="of tokens")
    add("--ours", action="append", default=[], metavar="KEY=VALUE", help="of EngineOptions")
    add("--out", type=Path, default=Path(__file__).with_name("results"), metavar="DIR")
    add("--most", type=int, metavar="X", help="leave out what is beyond, to try it out")
    options = parser.parse_args()
    for name in options.sweeps:
        if name not in SWEEPS:
            parser.error(f"{name} is not one of {', '.join(SWEEPS)}")
    return options


if __name__ == "__main__":
    main()
