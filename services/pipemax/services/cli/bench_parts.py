"""`pipemax bench kernels`, `transfers`, `coordinator` and `sampler`"""

from pathlib import Path
from typing import Annotated

import typer

AsJson = Annotated[bool, typer.Option("--json", help="One JSON object.")]
OutputJson = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Write the JSON object there, too."),
]
Count = Annotated[int, typer.Option(metavar="N", min=1)]
Tokens = Annotated[int, typer.Option(metavar="TOKENS", min=1)]


def kernels(
    dtype: Annotated[
        list[str] | None,
        typer.Option(
            metavar="float32|bfloat16|float16",
            help="Of KV and queries. May be given several times.",
            show_default="bfloat16, float32",
        ),
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(
            metavar="HEADS/KV_HEADS/HEAD_SIZE",
            help="May be given several times.",
            show_default="12/4/64, 32/8/128",
        ),
    ] = None,
    batch: Count = 64,
    shortest: Tokens = 64,
    longest: Tokens = 1024,
    as_json: AsJson = False,
    output_json: OutputJson = None,
) -> None:
    """Attention on one CPU core: decode beside reading memory, prompts beside matrix products."""
    from pipemax.proto.errors import ConfigError
    from pipemax.proto.geometry import DTYPE_BYTES
    from pipemax.services.bench import output, parts_command

    dtypes = dtype or ["bfloat16", "float32"]
    for given in dtypes:
        if given not in DTYPE_BYTES:
            raise ConfigError(f"--dtype {given} is not one of {', '.join(DTYPE_BYTES)}")
    shapes = [parts_command.Shape.of(text) for text in shape or ["12/4/64", "32/8/128"]]
    found = parts_command.kernels(dtypes, shapes, batch, shortest, longest)
    output.show(*found, as_json=as_json, output_json=output_json)


def transfers(
    block_bytes: Annotated[
        str, typer.Option(metavar="SIZE", help="Of a stage's KV block.")
    ] = "112KiB",
    num_blocks: Annotated[int, typer.Option(metavar="N", help="Copied at a time.", min=1)] = 2048,
    as_json: AsJson = False,
    output_json: OutputJson = None,
) -> None:
    """The KV daemon's copies on the CPU, beside one large copy of memory."""
    from pipemax.services.bench import output, parts_command
    from pipemax.services.config_limits import size_of

    found = parts_command.transfers(size_of("--block-bytes", block_bytes), num_blocks)
    output.show(*found, as_json=as_json, output_json=output_json)


def coordinator(
    requests: Annotated[int, typer.Option(metavar="N", help="Running at a time.", min=1)] = 2000,
    waiting: Annotated[int, typer.Option(metavar="N", help="Not yet running.", min=1)] = 8,
    stages: Count = 8,
    device_blocks: Count = 230_000,
    host_blocks: Annotated[int, typer.Option(metavar="N", min=0)] = 200_000,
    max_num_seqs: Count = 256,
    max_num_batched_tokens: Count = 4096,
    link_blocks: Annotated[
        float, typer.Option(metavar="N", help="That the link carries in a step.", min=0)
    ] = 2000,
    policy: Annotated[str, typer.Option(metavar="NAME", help="As of `pipemax up`.")] = "pipemax",
    steps: Annotated[int, typer.Option(metavar="N", help="Measured.", min=1)] = 400,
    as_json: AsJson = False,
    output_json: OutputJson = None,
) -> None:
    """Planning alone: the shipped scheduling core with perfect stages and a perfect KV daemon."""
    from pipemax.services.bench import output, parts_command
    from pipemax.services.bench.planner import PlannerLoad

    load = PlannerLoad(
        requests=requests,
        waiting=waiting,
        stages=stages,
        device_blocks=device_blocks,
        host_blocks=host_blocks,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        link_blocks=link_blocks,
        policy=policy,
    )
    found = parts_command.coordinator(load, steps)
    output.show(*found, as_json=as_json, output_json=output_json)


def sampler(
    rows: Annotated[int, typer.Option(metavar="N", help="Requests of a step.", min=1)] = 64,
    vocab_size: Annotated[
        list[int] | None,
        typer.Option(
            metavar="N", help="May be given several times.", min=64, show_default="16384, 128000"
        ),
    ] = None,
    kind: Annotated[
        list[str] | None,
        typer.Option(
            metavar="greedy|temperature|top-p|top-k|penalties",
            help="May be given several times.",
            show_default="all",
        ),
    ] = None,
    as_json: AsJson = False,
    output_json: OutputJson = None,
) -> None:
    """Sampling on one CPU core, each kind apart, beside reading the logits once."""
    from pipemax.services.bench import output, parts_command
    from pipemax.services.bench.sampling_kinds import KINDS

    found = parts_command.sampler(rows, vocab_size or [16_384, 128_000], kind or list(KINDS))
    output.show(*found, as_json=as_json, output_json=output_json)
