"""`pipemax bench throughput`: flags to requests, engines in turns, a report."""

import contextlib
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipemax.proto.errors import ConfigError
from pipemax.proto.rundir import runtime_root
from pipemax.services.batch.outputs import check_output
from pipemax.services.bench.data_flags import dataset_record, load_data
from pipemax.services.bench.engines import PURPOSE, Engine, our_engine, take_turns
from pipemax.services.bench.limit import Limit, limit_of
from pipemax.services.bench.limit_command import limit_data, share_of_limit
from pipemax.services.bench.machine import measure_machine, used_cores
from pipemax.services.bench.model import model_folder
from pipemax.services.bench.model_cost import cost_of, dtype_of, kv_token_bytes
from pipemax.services.bench.outcome import Side, Throughput, report_data, report_lines
from pipemax.services.bench.output import show, surroundings, tell
from pipemax.services.bench.peers import Peer, PeerFlags, Setting, find_peer, peer_engine
from pipemax.services.bench.work import Data, Work
from pipemax.services.cli.bench_flags import ThroughputFlags
from pipemax.services.launcher.rundir_files import sweep
from pipemax.services.machine import usable_cores
from pipemax.services.modelled_config import MODELLED
from pipemax.stage_worker.model.inspect import inspect_model

_ROUNDS_AGAINST = 5
_MODELLED_VOCAB = 4096
"""Token ids that every model of the catalogue has."""


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
        peer = _peer(flags, folder, longest, sum(request.total_tokens for request in rounds[0]))
        found = _limit(flags, folder, rounds[0]) if flags.limit else None
        with contextlib.ExitStack() as stack:
            name = f"PipeMax {version('pipemax')}"
            engines: list[Engine] = [stack.enter_context(our_engine(flags, longest, name))]
            if peer is not None:
                engines.append(stack.enter_context(peer_engine(peer, tell)))
            sides = take_turns(engines, rounds)
    size = Throughput.of(rounds[0])
    _report(flags, sides, size, found, as_json=as_json, output_json=output_json)


def _report(
    flags: ThroughputFlags,
    sides: tuple[Side, ...],
    size: Throughput,
    found: Limit | None,
    *,
    as_json: bool,
    output_json: Path | None,
) -> None:
    ours, peer = sides[0], sides[1] if len(sides) > 1 else None
    lines = report_lines(size, ours, peer)
    data: dict[str, Any] = {
        **report_data(size, ours, peer),
        "dataset": dataset_record(flags, flags.seed),
        **surroundings(),
    }
    if found is not None:
        shares = share_of_limit(found, ours.seconds)
        data |= {**limit_data(found, size), "share_of_limit": shares}
        each = ", ".join(f"{share:.0%}" for share in shares)
        lines.append(f"Limit of this machine: {found.seconds:.2f} s; reached: {each}")
    show(lines, data, as_json=as_json, output_json=output_json)


def _peer(
    flags: ThroughputFlags, folder: Path, longest_tokens: int, all_tokens: int
) -> Peer | None:
    """Raises ConfigError for flags that do not go together, and what is not there."""
    if flags.against is None:
        for flag in ("peer", "peer_model", "peer_arg", "peer_env"):
            if getattr(flags, flag) is not None:
                raise ConfigError(f"--{flag.replace('_', '-')} goes with --against ENGINE")
        return None
    if flags.device != "cpu":
        raise ConfigError(
            f"--against {flags.against} with --device {flags.device} is not implemented: two "
            "engines are loaded at once, and would share the GPU's memory; measure on the CPU"
        )
    asked = PeerFlags(
        against=flags.against,
        place=flags.peer,
        model=flags.peer_model,
        arguments=tuple(flags.peer_arg or ()),
        environment=tuple(flags.peer_env or ()),
    )
    setting = Setting(
        model=folder.absolute(),
        dtype=flags.dtype,
        load_format=flags.load_format,
        longest_tokens=longest_tokens,
        kv_bytes=all_tokens * kv_token_bytes(folder, flags.dtype),
        enable_prefix_caching=flags.enable_prefix_caching,
        cores=used_cores(usable_cores()),
    )
    return find_peer(asked, setting)


def _limit(flags: ThroughputFlags, folder: Path, work: Work) -> Limit:
    """Of all usable cores. Raises ConfigError for a device of which nothing is known."""
    if flags.device != "cpu":
        raise ConfigError(
            f"--limit with --device {flags.device}: only CPUs are measured; leave out --limit"
        )
    info = inspect_model(folder, "dummy")
    dtype = dtype_of(flags.dtype, info)
    cost, matrices = cost_of(folder, info, dtype, work)
    cores = used_cores(usable_cores())
    machine = measure_machine(cores, [dtype], matrices, tell, num_layers=info.num_layers)
    return limit_of(work, cost, machine.rates(dtype))


def _num_rounds(flags: ThroughputFlags, data: Data) -> int:
    rounds = flags.rounds or (1 if flags.against is None else _ROUNDS_AGAINST)
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
