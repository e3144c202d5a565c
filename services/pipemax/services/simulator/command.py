"""What `pipemax simulate` does with its flags."""

import json
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path

import typer
from rich.console import Console

from pipemax.coordinator.phases import DEFAULT_PREFILL
from pipemax.coordinator.policy import DEFAULT_POLICY
from pipemax.proto.errors import ConfigError
from pipemax.proto.sizes import parse_size
from pipemax.services.cli.simulation_flags import PlanFlags, SimulateFlags
from pipemax.services.simulator.faults import parse_fault
from pipemax.services.simulator.gantt import draw_svg
from pipemax.services.simulator.measured import load_measured
from pipemax.services.simulator.peers import parse_peers, simulate_peer
from pipemax.services.simulator.records import Result
from pipemax.services.simulator.report import Run, describe, result_data, result_view
from pipemax.services.simulator.spec import SimulationSpec, Timing, measured_spec
from pipemax.services.simulator.workload import Workload, parse_workload
from pipemax.services.simulator.world import World
from pipemax.stage_worker.modelled.catalogue import load_catalogue
from pipemax.stage_worker.modelled.roofline import Efficiencies

_ROUNDS_SHOWN = 3
_FROM_FILE = (
    "gpu",
    "count",
    "model",
    "layer_split",
    "catalogue",
    "gpus_per_uplink",
    "host_memory_gb_s",
    "disk_gb_s",
    "bits",
    "block_size",
    "gemm_staircase",
)
"""Flags in whose place --measured stands."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """What else is to be run, for comparison."""

    without_offloading: bool = False
    peers: tuple[str, ...] = ()
    """As given: names, or lists of names."""
    all_reduce_gb_s: float | None = None


def build_spec(flags: PlanFlags) -> SimulationSpec:
    """Raises ConfigError or ModelError for what cannot be simulated."""
    if not isinstance(flags, SimulateFlags):
        return _planned_spec(flags)
    spec = _measured_spec(flags, flags.measured) if flags.measured else _planned_spec(flags)
    if flags.horizon_s is not None and not 0 < flags.horizon_s < 1e9:
        raise ConfigError(f"--horizon {flags.horizon_s:g} is not a time above 0")
    return replace(
        spec,
        timing=replace(
            spec.timing, link_jitter=flags.link_jitter, compute_jitter=flags.compute_jitter
        ),
        prefill=flags.prefill or DEFAULT_PREFILL,
        horizon_s=flags.horizon_s or spec.horizon_s,
        warm_up_s=flags.warm_up_s,
        faults=tuple(parse_fault(text, spec.num_gpus) for text in flags.faults or ()),
    )


def _measured_spec(flags: SimulateFlags, path: Path) -> SimulationSpec:
    for field in fields(flags):
        if field.name in _FROM_FILE and getattr(flags, field.name) != field.default:
            raise ConfigError(
                f"--{field.name.replace('_', '-')} does not go with --measured: {path} says it"
            )
    if flags.kv_offloading_size not in (_default("kv_offloading_size"), "0"):
        raise ConfigError(
            f"--kv-offloading-size {flags.kv_offloading_size} does not go with --measured: {path} "
            "says it; only 0 does, to turn offloading off"
        )
    spec = measured_spec(load_measured(path), _workload(flags))
    return replace(
        spec,
        host_bytes=spec.host_bytes if flags.kv_offloading_size != "0" else 0,
        max_num_seqs=flags.max_num_seqs,
        max_num_batched_tokens=flags.max_num_batched_tokens,
        policy=flags.policy or DEFAULT_POLICY,
        seed=flags.seed,
    )


def _default(name: str) -> object:
    return next(field.default for field in fields(SimulateFlags) if field.name == name)


def _workload(flags: PlanFlags) -> Workload:
    return parse_workload(flags.workload, flags.requests, flags.seed, flags.sigma)


def _planned_spec(flags: PlanFlags) -> SimulationSpec:
    catalogue = load_catalogue(flags.catalogue)
    weight_bits, kv_bits = _parse_bits(flags.bits)
    return SimulationSpec(
        gpu=catalogue.gpu(flags.gpu),
        num_gpus=flags.count,
        model=catalogue.model(flags.model),
        workload=_workload(flags),
        efficiencies=Efficiencies(gemm_staircase=flags.gemm_staircase),
        layer_split=_parse_split(flags.layer_split),
        weight_element_bytes=weight_bits / 8,
        kv_element_bytes=kv_bits / 8,
        host_bytes=parse_size(flags.kv_offloading_size),
        block_size=flags.block_size,
        max_num_seqs=flags.max_num_seqs,
        max_num_batched_tokens=flags.max_num_batched_tokens,
        gpus_per_uplink=flags.gpus_per_uplink,
        timing=Timing(
            host_memory_bytes_s=_rate("--host-memory-gb-s", flags.host_memory_gb_s),
            disk_bytes_s=_rate("--disk-gb-s", flags.disk_gb_s),
        ),
        policy=flags.policy or DEFAULT_POLICY,
        seed=flags.seed,
    )


def run_simulate(
    flags: SimulateFlags,
    comparison: Comparison,
    *,
    as_json: bool,
    svg: Path | None,
    window: str | None,
) -> None:
    """Simulates, prints and draws. Raises ConfigError for flags that cannot work."""
    spec = build_spec(flags)
    shown = _parse_window(window)
    if shown and svg is None:
        raise ConfigError("--window says what --svg shows; give --svg FILE as well")
    console = Console(stderr=True)
    with console.status("simulating") as status:
        runs = _run_all(spec, comparison, status.update)
        if svg is not None:
            picture = _draw(spec, runs[0].result, shown, status.update)
    if svg is not None:
        try:
            svg.write_text(picture)
        except OSError as error:
            raise ConfigError(f"cannot write {svg}: {error.strerror}") from error
    if as_json:
        typer.echo(json.dumps([result_data(run) for run in runs]))
        return
    out = Console()
    out.print(f"[bold]{describe(spec)}[/bold]", highlight=False)
    out.print(result_view(runs), highlight=False)


def _run_all(
    spec: SimulationSpec, comparison: Comparison, update: Callable[[str], None]
) -> list[Run]:
    """The simulation asked for first, then what it is compared with. Models of peers go first in
    time: they take little, and refuse at once what they cannot do."""
    if comparison.without_offloading and not spec.host_bytes:
        raise ConfigError("--compare needs offloading on: give --kv-offloading-size a size")
    bus = comparison.all_reduce_gb_s
    bus_bytes_s = None if bus is None else _rate("--all-reduce-gb-s", bus)
    peers = [simulate_peer(name, spec, bus_bytes_s) for name in parse_peers(comparison.peers)]
    heading = "with offloading" if spec.host_bytes else "without offloading"
    runs = [Run(heading, spec, run_watched(spec, heading, update))]
    if comparison.without_offloading:
        other = replace(spec, host_bytes=0)
        heading = "without offloading"
        runs.append(Run(heading, other, run_watched(other, heading, update)))
    return runs + [Run(heading, one, result, peer=True) for heading, one, result in peers]


def run_watched(spec: SimulationSpec, name: str, update: Callable[[str], None]) -> Result:
    """Runs a spec and says how far it is."""

    def progress(seconds: float, finished: int) -> None:
        total = len(spec.workload.requests)
        update(f"{name}: {seconds:,.0f} s simulated, {finished:,} of {total:,} requests")

    return World(spec, on_progress=progress).run()


def _draw(
    spec: SimulationSpec,
    result: Result,
    window: tuple[float, float] | None,
    update: Callable[[str], None],
) -> str:
    """Runs it again, now that we know when most requests ran, and keeps what happens then."""
    if window is None:
        width = _ROUNDS_SHOWN * spec.num_gpus * result.simulated_s / max(result.steps, 1)
        most = max((sample.running for sample in result.timeline), default=0)
        busy = [sample.at_s for sample in result.timeline if sample.running >= 0.8 * most]
        middle = busy[len(busy) // 2] if busy else 0.0
        window = (max(0.0, middle - width / 2), max(middle, width / 2) + width / 2)
    again = replace(spec, gantt_s=window, horizon_s=min(spec.horizon_s, window[1]))
    result.intervals = run_watched(again, "for the picture", update).intervals
    return draw_svg(again, result, describe(spec))


def _parse_bits(text: str) -> tuple[int, int]:
    first, slash, second = text.partition("/")
    allowed = {"4": 4, "8": 8, "16": 16, "32": 32}
    if not slash or first not in allowed or second not in allowed:
        raise ConfigError(f"--bits {text!r} is not two of 4, 8, 16, 32, such as 16/8")
    return allowed[first], allowed[second]


def _parse_split(text: str | None) -> tuple[int, ...]:
    """Empty for None; SimulationSpec checks that it fits."""
    try:
        return tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError as error:
        raise ConfigError(f"--layer-split {text!r} is not numbers such as 11,10,10,9") from error


def _rate(flag: str, giga: float) -> float:
    """Bytes per second."""
    if not 0 < giga < 1e6:
        raise ConfigError(f"{flag} {giga:g} is not a rate above 0, in 1e9 bytes per second")
    return giga * 1e9


def _parse_window(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    try:
        start_s, end_s = (float(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(f"--window {text!r} is not two times such as 100,102") from error
    if not 0 <= start_s < end_s:
        raise ConfigError(f"--window {text!r}: the first time must be before the second")
    return start_s, end_s
