"""`pipemax demo`: a small model, two stages, and a device KV pool that is too small.

The requests run by the same code as `pipemax run-batch`; what is special here is only that model,
requests and sizes are made up so that KV has to travel, and that the result is checked.
"""

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import typer
from rich.console import Console
from tokenizers import Tokenizer

from pipemax.client import Client
from pipemax.proto.errors import ConfigError, PipemaxSystemError
from pipemax.proto.geometry import BlockGeometry, blocks_for, split_layers
from pipemax.proto.messages.ingest import Status
from pipemax.proto.rundir import runtime_root
from pipemax.proto.sizes import format_size
from pipemax.services.batch.files import BatchFiles, run_files
from pipemax.services.batch.outputs import check_output
from pipemax.services.batch.report import BatchReport
from pipemax.services.cli.options import EngineOptions
from pipemax.services.engine_config import build_config
from pipemax.services.launcher.rundir_files import own_name, sweep
from pipemax.services.own_system import own_system
from pipemax.services.status_view import stage_table
from pipemax.services.tiny_model import demo_requests, make_demo_model
from pipemax.services.token_bar import TokenBar
from pipemax.stage_worker.model.inspect import inspect_model

_PURPOSE = "demo"
_NUM_STAGES = 2
_BLOCK_SIZE = 16
_DTYPE: Literal["float32"] = "float32"
_POOL_SHARE = 3
"""The device pool holds one part in so many of the working set."""
_TEMPLATE_TOKENS = 32
"""More than the chat template adds to a conversation."""
_READY_TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class _Files:
    """All of one demo."""

    model: Path
    requests: Path
    results: Path


@dataclass(frozen=True, slots=True)
class _Sizes:
    """What the requests need, in blocks and tokens."""

    working_set_blocks: int
    """Of all requests at their full length, at once."""
    longest_tokens: int


def run_demo(keep: Path | None) -> None:
    """Runs the demo and prints what happened. Files go to `keep`, or to a temporary folder.

    Raises PipemaxSystemError when no KV travelled or a token differs from transformers' own: then
    the demo did not show what it is for.
    """
    with _folder(keep) as folder:
        files = _Files(folder / "model", folder / "requests.jsonl", folder / "results.jsonl")
        sizes = _make_inputs(files)
        report, status = _run(files, sizes)
        _print_report(report, status)
        if report.failed:
            raise PipemaxSystemError(f"{report.failed} of {report.requests} requests failed")
        if not (status.load_bytes and status.store_bytes and status.decode_prefetched_tokens):
            raise PipemaxSystemError(
                "no KV travelled between device and host, which is what this demo is about; "
                "please report it with the output of `pipemax collect-env`"
            )
        _compare_with_transformers(files)
        if keep is not None:
            typer.echo(f"model, requests and results are in {folder}")


@contextlib.contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="pipemax-demo-") as folder:
            yield Path(folder)
        return
    try:
        keep.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--keep {keep}: {error.strerror}; give a folder that can be written"
        ) from error
    check_output(keep / "results.jsonl")
    yield keep


def _make_inputs(files: _Files) -> _Sizes:
    make_demo_model(files.model)
    tokenizer = Tokenizer.from_file(str(files.model / "tokenizer.json"))
    requests = [_greedy_as_token_ids(line, tokenizer) for line in demo_requests(model=_PURPOSE)]
    files.requests.write_text("".join(json.dumps(line) + "\n" for line in requests))
    tokens = [_most_tokens(line["body"], tokenizer) for line in requests]
    return _Sizes(sum(blocks_for(count, _BLOCK_SIZE) for count in tokens), max(tokens))


def _greedy_as_token_ids(line: dict[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """Greedy completions ask with token ids and are answered with token ids, which can be compared
    exactly; the others stay text."""
    body = line["body"]
    if body["temperature"] > 0 or "prompt" not in body:
        return line
    return line | {"body": body | {"prompt": tokenizer.encode(body["prompt"]).ids}}


def _most_tokens(body: dict[str, Any], tokenizer: Tokenizer) -> int:
    prompt = body.get("prompt")
    if isinstance(prompt, list):
        return len(prompt) + int(body["max_tokens"])
    texts = [prompt] if prompt else [message["content"] for message in body["messages"]]
    tokens = sum(len(tokenizer.encode(text).ids) for text in texts)
    return tokens + _TEMPLATE_TOKENS + int(body["max_tokens"])


def _run(files: _Files, sizes: _Sizes) -> tuple[BatchReport, Status]:
    sweep(runtime_root(), _PURPOSE)
    config = build_config(_options(files, sizes), own_name(_PURPOSE))
    typer.echo(
        f"working set {sizes.working_set_blocks} KV blocks, device pool a third of it: "
        f"{format_size(config.pool_bytes)} on each of {_NUM_STAGES} stages, "
        f"host pool {format_size(config.kv_offloading_bytes)}"
    )
    with (
        own_system(config, ready_timeout_s=_READY_TIMEOUT_S, temporary=True) as system,
        Client(system.config.name, label="demo") as client,
    ):
        with TokenBar() as bar:
            batch = BatchFiles(inputs=(files.requests,), outputs=(files.results,), overwrite=True)
            report = run_files(client, batch, {}, bar)
        return report, client.status()


def _options(files: _Files, sizes: _Sizes) -> EngineOptions:
    info = inspect_model(files.model)
    block_bytes = [
        BlockGeometry(layers, _BLOCK_SIZE, info.num_kv_heads, info.head_dim, _DTYPE).block_bytes
        for layers in split_layers(info.num_layers, _NUM_STAGES)
    ]
    device_blocks = sizes.working_set_blocks // _POOL_SHARE
    return EngineOptions(
        model=str(files.model),
        served_model_name=_PURPOSE,
        dtype=_DTYPE,
        pipeline_parallel_size=_NUM_STAGES,
        block_size=_BLOCK_SIZE,
        max_model_len=sizes.longest_tokens,
        kv_cache_memory_bytes=str(device_blocks * max(block_bytes)),
        kv_offloading_size=str(2 * sizes.working_set_blocks * sum(block_bytes)),
    )


def _print_report(report: BatchReport, status: Status) -> None:
    share = status.decode_prefetched_tokens / max(1, status.decode_context_tokens)
    typer.echo(f"{report.requests} requests in {report.seconds:.1f} s")
    typer.echo(report.throughput)
    typer.echo(
        f"KV moved: {format_size(status.load_bytes)} host to device, "
        f"{format_size(status.store_bytes)} device to host; "
        f"{share:.0%} of the context that decode read was prefetched from the host"
    )
    Console(file=sys.stdout).print(stage_table(status))


def _compare_with_transformers(files: _Files) -> None:
    typer.echo("comparing greedy tokens with transformers ...", err=True)
    arguments: Sequence[Path] = (files.model, files.requests, files.results)
    check = subprocess.run(
        [sys.executable, "-P", "-m", "pipemax.services.demo_check", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    if check.returncode != 0:
        lines = check.stderr.strip().splitlines() or ["no reason given"]
        raise PipemaxSystemError(f"the comparison with transformers failed: {lines[-1]}")
    typer.echo(check.stdout.strip())
