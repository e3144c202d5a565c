"""`pipemax bench limit`: the machine's rates, and what they allow for a workload."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipemax.proto.errors import ConfigError
from pipemax.proto.geometry import Dtype
from pipemax.services.batch.outputs import check_output
from pipemax.services.bench.data_flags import dataset_record, load_data
from pipemax.services.bench.limit import Limit, limit_of
from pipemax.services.bench.machine import Machine, measure_machine, used_cores
from pipemax.services.bench.model import model_folder
from pipemax.services.bench.model_cost import cost_of, dtype_of
from pipemax.services.bench.outcome import Throughput
from pipemax.services.bench.output import show, surroundings, tell
from pipemax.services.cli.bench_flags import LimitFlags
from pipemax.services.machine import usable_cores
from pipemax.stage_worker.model.inspect import inspect_model

_ALWAYS: tuple[Dtype, ...] = ("bfloat16", "float32")
"""Are measured, whatever the model's own."""


def run_limit(flags: LimitFlags, *, as_json: bool, output_json: Path | None) -> None:
    """Prints the report. Raises ConfigError for what cannot be measured."""
    if output_json is not None:
        check_output(output_json)
    cores = cores_of(flags.cores)
    with model_folder(None if flags.model is None else Path(flags.model).expanduser()) as folder:
        info = inspect_model(folder, "dummy")
        work = load_data(flags, folder, info.vocab_size, flags.seed).round(0)
        dtype = dtype_of(flags.dtype, info)
        cost, matrices = cost_of(folder, info, dtype, work)
    dtypes: list[Dtype] = [dtype, *(one for one in _ALWAYS if one != dtype)]
    machine = measure_machine(cores, dtypes, matrices, tell, num_layers=info.num_layers)
    found = limit_of(work, cost, machine.rates(dtype), flags.max_num_seqs)
    size = Throughput.of(work)
    data = {
        **limit_data(found, size),
        "dtype": dtype,
        "machine_rates": machine_data(machine),
        "dataset": dataset_record(flags, flags.seed),
        **surroundings(),
    }
    lines = [*machine_lines(machine), "", *limit_lines(found, size, dtype, len(cores))]
    show(lines, data, as_json=as_json, output_json=output_json)


def cores_of(count: int | None) -> tuple[int, ...]:
    """Raises ConfigError for more than there are."""
    usable = usable_cores()
    if count is not None and not 1 <= count <= usable:
        raise ConfigError(f"--cores {count}: this process may use 1 to {usable}")
    return used_cores(count or usable)


def limit_lines(found: Limit, size: Throughput, dtype: str, cores: int) -> list[str]:
    return [
        f"Limit of {cores} cores in {dtype}: {found.seconds:.2f} s, "
        f"{size.num_requests / found.seconds:.2f} requests/s, "
        f"{size.total_tokens / found.seconds:.2f} total tokens/s, "
        f"{size.output_tokens / found.seconds:.2f} output tokens/s",
        f"  prompts, {size.prompt_tokens} tokens: {found.prompts_s:.2f} s",
        f"  products or weights of {found.steps} decode steps, at most {found.most_requests} "
        f"requests each: {found.products_s:.2f} s",
        f"  reading KV: {found.kv_s:.2f} s",
        f"No schedule at all would take less than {found.bound_s:.2f} s at these rates.",
    ]


def limit_data(found: Limit, size: Throughput) -> dict[str, Any]:
    return {
        "limit_time": found.seconds,
        "limit_requests_per_second": size.num_requests / found.seconds,
        "limit_tokens_per_second": size.total_tokens / found.seconds,
        "limit_output_tokens_per_second": size.output_tokens / found.seconds,
        "limit_prompts_seconds": found.prompts_s,
        "limit_products_seconds": found.products_s,
        "limit_kv_seconds": found.kv_s,
        "limit_steps": found.steps,
        "limit_most_requests": found.most_requests,
        "limit_bound_seconds": found.bound_s,
        "limit_num_requests": size.num_requests,
        "limit_num_output_tokens": size.output_tokens,
    }


def machine_lines(machine: Machine) -> list[str]:
    count = len(machine.cores)
    read = machine.read_bytes_s
    lines = [
        f"Reading memory: {read.one_core / 1e9:.1f} GB/s on one core, "
        f"{read.all_cores / 1e9:.1f} GB/s on {count} together",
        "Matrix products, TFLOP/s:",
        f"  {'dtype':<10} {'rows':>5} {'one core':>9} {f'{count} cores':>9}",
    ]
    for dtype, by_rows in machine.products_flop_s.items():
        for rows, rate in by_rows.items():
            one, every = rate.one_core / 1e12, rate.all_cores / 1e12
            lines.append(f"  {dtype:<10} {rows:>5} {one:>9.3f} {every:>9.3f}")
    return lines


def machine_data(machine: Machine) -> dict[str, Any]:
    return {
        "cores": list(machine.cores),
        "read_bytes_per_second": {
            "one_core": machine.read_bytes_s.one_core,
            "all_cores": machine.read_bytes_s.all_cores,
        },
        "products_flop_per_second": {
            dtype: {
                str(rows): {"one_core": rate.one_core, "all_cores": rate.all_cores}
                for rows, rate in by_rows.items()
            }
            for dtype, by_rows in machine.products_flop_s.items()
        },
    }


def share_of_limit(found: Limit, seconds: Sequence[float]) -> list[float]:
    """Of each round: 1 is as fast as the machine could be."""
    return [found.seconds / one for one in seconds]
