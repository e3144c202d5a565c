"""`pipemax bench throughput`: flags to requests, engines in turns, a report."""

import contextlib
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import typer

from pipemax.proto.errors import ConfigError
from pipemax.proto.rundir import runtime_root
from pipemax.services.batch.outputs import check_output
from pipemax.services.bench.engines import PURPOSE, Engine, our_engine, take_turns
from pipemax.services.bench.model import model_folder
from pipemax.services.bench.outcome import Throughput, report_data, report_lines
from pipemax.services.bench.work import Data, jsonl_data, lognormal_data, sharegpt_data
from pipemax.services.cli.bench_flags import ThroughputFlags, WorkFlags
from pipemax.services.launcher.rundir_files import sweep
from pipemax.services.machine import memory_bytes, usable_cores
from pipemax.services.modelled_config import MODELLED
from pipemax.stage_worker.model.inspect import inspect_model

NUM_PROMPTS = 128
LOGNORMAL = {"input_len": 128.0, "output_len": 96.0, "sigma": 0.6}
"""Defaults."""
_MODELLED_VOCAB = 4096
"""Token ids that every model of the catalogue has."""
_PACKAGES = ("pipemax", "torch", "transformers", "numpy", "numba")


def run_throughput(flags: ThroughputFlags, *, as_json: bool, output_json: Path | None) -> None:
    """Prints the report. Raises ConfigError before anything starts for what cannot work."""
    if output_json is not None:
        check_output(output_json)
    sweep(runtime_root(), PURPOSE)
    with model_folder(None if flags.model is None else Path(flags.model).expanduser()) as folder:
        flags = replace(
            flags,
            model=flags.model or str(folder),
            served_model_name=flags.served_model_name or flags.model or "bench",
        )
        data = load_data(flags, folder, _vocab_size(flags, folder), flags.seed)
        rounds = [data.round(number) for number in range(_num_rounds(flags, data))]
        longest = max(request.total_tokens for request in rounds[0])
        with contextlib.ExitStack() as stack:
            name = f"PipeMax {version('pipemax')}"
            engines: list[Engine] = [stack.enter_context(our_engine(flags, longest, name))]
            sides = take_turns(engines, rounds)
    size = Throughput.of(rounds[0])
    report = {
        **report_data(size, sides[0], None),
        "dataset": dataset_record(flags, flags.seed),
        **surroundings(),
    }
    show(report_lines(size, sides[0], None), report, as_json=as_json, output_json=output_json)


def load_data(flags: WorkFlags, model: Path, vocab_size: int, seed: int) -> Data:
    """Raises ConfigError for a flag that does not go with the data set, and for its file."""
    name, path = flags.dataset_name, flags.dataset_path
    if name not in _TAKES:
        raise ConfigError(f"--dataset-name {name} is not one of {', '.join(_TAKES)}")
    for flag in ("dataset_path", "input_len", "output_len", "sigma"):
        if getattr(flags, flag) is not None and flag not in _TAKES[name]:
            raise ConfigError(f"--{flag.replace('_', '-')} does not go with --dataset-name {name}")
    if name == "lognormal":
        return lognormal_data(
            flags.num_prompts or NUM_PROMPTS,
            **_lognormal(flags),
            vocab_size=vocab_size,
            seed=seed,
        )
    if path is None:
        raise ConfigError(f"--dataset-name {name} needs --dataset-path FILE")
    if name == "jsonl":
        return jsonl_data(path, flags.num_prompts, vocab_size)
    return sharegpt_data(
        path,
        flags.num_prompts or NUM_PROMPTS,
        model / "tokenizer.json",
        output_len=_whole(flags.output_len),
        seed=seed,
    )


_TAKES: Mapping[str, tuple[str, ...]] = {
    "lognormal": ("input_len", "output_len", "sigma"),
    "sharegpt": ("dataset_path", "output_len"),
    "jsonl": ("dataset_path",),
}


def dataset_record(flags: WorkFlags, seed: int) -> dict[str, Any]:
    """What the requests were, for the JSON object."""
    record: dict[str, Any] = {"dataset_name": flags.dataset_name, "seed": seed}
    if flags.dataset_path is not None:
        record["dataset_path"] = str(flags.dataset_path)
    if flags.dataset_name == "lognormal":
        record |= _lognormal(flags)
    elif flags.output_len is not None:
        record["output_len"] = flags.output_len
    return record


def _lognormal(flags: WorkFlags) -> dict[str, float]:
    given = {flag: getattr(flags, flag) for flag in LOGNORMAL}
    return {flag: LOGNORMAL[flag] if one is None else one for flag, one in given.items()}


def surroundings() -> dict[str, Any]:
    """Of a measurement, so that nobody compares what cannot be: versions, machine, what else it
    was doing."""
    return {
        "versions": {name: _version(name) for name in _PACKAGES}
        | {"python": platform.python_version()},
        "machine": {
            "processor": platform.machine(),
            "cores": usable_cores(),
            "memory_bytes": memory_bytes(),
            "load_average": list(os.getloadavg()),
        },
    }


def show(
    lines: list[str], data: Mapping[str, Any], *, as_json: bool, output_json: Path | None
) -> None:
    """Text, or with `as_json` one JSON object, on standard output; the object in a file, too."""
    text = json.dumps(data)
    if output_json is not None:
        output_json.write_text(text + "\n", encoding="utf-8")
    typer.echo(text if as_json else "\n".join(lines))


def _num_rounds(flags: ThroughputFlags, data: Data) -> int:
    rounds = flags.rounds or 1
    if rounds > 1 and data.repeats and flags.enable_prefix_caching:
        raise ConfigError(
            f"{rounds} rounds of --dataset-name {flags.dataset_name} have the same prompts, and "
            "from the second on they would be found in the prefix cache: give "
            "--no-enable-prefix-caching, or --rounds 1"
        )
    return rounds


def _vocab_size(flags: ThroughputFlags, folder: Path) -> int:
    if flags.device.startswith(MODELLED):
        return _MODELLED_VOCAB
    return inspect_model(folder, "dummy").vocab_size


def _whole(tokens: float | None) -> int | None:
    if tokens is None:
        return None
    if tokens != int(tokens) or tokens < 1:
        raise ConfigError(f"--output-len {tokens:g} is not a whole number of at least 1")
    return int(tokens)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
