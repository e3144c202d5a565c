"""The flags of a benchmark's data set, checked, and the requests they ask for."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipemax.proto.errors import ConfigError
from pipemax.services.bench.work import Data, jsonl_data, lognormal_data, sharegpt_data
from pipemax.services.cli.bench_flags import WorkFlags

NUM_PROMPTS = 128
LOGNORMAL = {"input_len": 128.0, "output_len": 96.0, "sigma": 0.6}
"""Defaults."""


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


def _whole(tokens: float | None) -> int | None:
    if tokens is None:
        return None
    if tokens != int(tokens) or tokens < 1:
        raise ConfigError(f"--output-len {tokens:g} is not a whole number of at least 1")
    return int(tokens)
