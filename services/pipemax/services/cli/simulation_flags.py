"""The flags of `pipemax plan` and `pipemax simulate`, each defined once.

`PlanFlags` are those of both, `SimulateFlags` adds what only a simulation knows.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

_HARDWARE, _LOAD, _SCHEDULE, _ASSUME = (
    "Hardware and model",
    "Load",
    "Scheduling",
    "Assumptions and faults",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanFlags:
    """What a user asked for, not yet validated; `simulator.command.build_spec` does that."""

    gpu: Annotated[
        str, typer.Option(metavar="NAME", help="By catalogue.", rich_help_panel=_HARDWARE)
    ] = "rtx-3090"
    count: Annotated[
        int,
        typer.Option(
            "--count",
            "-n",
            metavar="N",
            help="GPUs, one stage each.",
            min=1,
            rich_help_panel=_HARDWARE,
        ),
    ] = 8
    model: Annotated[
        str,
        typer.Option(
            metavar="NAME|DIR",
            help="By catalogue, or a folder with a config.json.",
            rich_help_panel=_HARDWARE,
        ),
    ] = "llama-2-70b"
    layer_split: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,...",
            help="Layers per stage.",
            show_default="as even as can be",
            rich_help_panel=_HARDWARE,
        ),
    ] = None
    catalogue: Annotated[
        Path | None,
        typer.Option(metavar="FILE.toml", help="More GPUs and models.", rich_help_panel=_HARDWARE),
    ] = None
    kv_offloading_size: Annotated[
        str,
        typer.Option(
            metavar="SIZE",
            help="Host memory for KV, all stages together; 0 turns offloading off.",
            rich_help_panel=_HARDWARE,
        ),
    ] = "400GB"
    gpus_per_uplink: Annotated[
        int,
        typer.Option(min=1, help="GPUs that share one host link.", rich_help_panel=_HARDWARE),
    ] = 1
    host_memory_gb_s: Annotated[
        float,
        typer.Option(
            metavar="GB/S",
            help="Bandwidth of host memory, shared by all links. The default is an assumption: "
            "two sockets of eight DDR4-3200 channels.",
            rich_help_panel=_HARDWARE,
        ),
    ] = 400.0
    disk_gb_s: Annotated[
        float,
        typer.Option(
            metavar="GB/S",
            help="Disk that weights are read from, at the start and after a crash, one stage after "
            "the other. It holds no KV: PipeMax has no disk tier. The default is an assumption: "
            "a PCIe 3.0 NVMe drive.",
            rich_help_panel=_HARDWARE,
        ),
    ] = 3.0
    bits: Annotated[
        str,
        typer.Option(
            metavar="WEIGHTS/KV",
            help="Bits per weight and per KV element. Weights of fewer bits are only read faster; "
            "they compute at the rate of bfloat16.",
            rich_help_panel=_HARDWARE,
        ),
    ] = "16/16"
    workload: Annotated[
        str,
        typer.Option(
            metavar="NAME|IN,OUT|FILE",
            help="sharegpt, longbench, two mean lengths, or JSONL lines with prompt_tokens and "
            "output_tokens, and max_tokens where a request states it.",
            rich_help_panel=_LOAD,
        ),
    ] = "sharegpt"
    requests: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Submitted at once. At most so many lines of a file.",
            min=1,
            rich_help_panel=_LOAD,
        ),
    ] = 1000
    sigma: Annotated[
        float,
        typer.Option(
            help="Spread of drawn lengths: standard deviation of their logarithm.",
            rich_help_panel=_LOAD,
        ),
    ] = 0.8
    seed: Annotated[
        int, typer.Option(metavar="N", help="Of lengths and jitter.", rich_help_panel=_LOAD)
    ] = 0
    policy: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Selection policy: pipemax, oldest-first, fcfs, count-balanced or "
            "static-prefetch:<fraction>.",
            show_default="the scheduler's",
            rich_help_panel=_SCHEDULE,
        ),
    ] = None
    block_size: Annotated[
        int,
        typer.Option(
            metavar="TOKENS",
            min=1,
            max=256,
            help="Tokens per KV block. Larger ones simulate faster and hold less in small pools.",
            rich_help_panel=_SCHEDULE,
        ),
    ] = 32
    max_num_seqs: Annotated[
        int,
        typer.Option(
            metavar="N", min=1, help="Requests in a micro-batch.", rich_help_panel=_SCHEDULE
        ),
    ] = 1024
    max_num_batched_tokens: Annotated[
        int,
        typer.Option(
            metavar="TOKENS", min=1, help="Tokens in a micro-batch.", rich_help_panel=_SCHEDULE
        ),
    ] = 2048
    gemm_staircase: Annotated[
        bool,
        typer.Option(
            "--gemm-staircase",
            help="GEMM cost climbs in steps of 128 tokens, as measured on an L20.",
            rich_help_panel=_ASSUME,
        ),
    ] = False


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulateFlags(PlanFlags):
    """The same, with what only a simulation knows."""

    measured: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.json",
            help="Costs measured on a live system, in place of GPU, model, links and memory. The "
            "form is described in pipemax.services.simulator.measured.",
            rich_help_panel=_HARDWARE,
        ),
    ] = None

    prefill: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="When prompts are computed: mixed into decode steps, or in phases of their own.",
            show_default="the scheduler's",
            rich_help_panel=_SCHEDULE,
        ),
    ] = None
    horizon_s: Annotated[
        float | None,
        typer.Option(
            "--horizon",
            metavar="SECONDS",
            help="Stop at this simulated time.",
            show_default="when all requests are done",
            rich_help_panel=_ASSUME,
        ),
    ] = None
    warm_up_s: Annotated[
        float,
        typer.Option(
            "--warm-up",
            metavar="SECONDS",
            min=0.0,
            help="The rate while requests wait counts from here on.",
            rich_help_panel=_ASSUME,
        ),
    ] = 0.0
    link_jitter: Annotated[
        float,
        typer.Option(help="Standard deviation of copies, as a share.", rich_help_panel=_ASSUME),
    ] = 0.0
    compute_jitter: Annotated[
        float,
        typer.Option(help="Standard deviation of steps, as a share.", rich_help_panel=_ASSUME),
    ] = 0.0
    faults: Annotated[
        list[str] | None,
        typer.Option(
            "--fault",
            metavar="KIND[:STAGE]@S[+S][xFACTOR]",
            help="crash-stage, crash-daemon, slow-link, slow-stage, lost-message, late-message or "
            "duplicate-message, at a time, for a time, at a share of its speed: "
            "crash-stage:3@120+5, slow-link:2@60+30x0.25. Repeatable.",
            rich_help_panel=_ASSUME,
        ),
    ] = None
