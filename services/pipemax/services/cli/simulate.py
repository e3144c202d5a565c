"""`pipemax simulate`"""

from pathlib import Path
from typing import Annotated

import typer

_HARDWARE, _LOAD, _SCHEDULE, _ASSUME, _OUTPUT = (
    "Hardware and model",
    "Load",
    "Scheduling",
    "Assumptions and faults",
    "Output",
)

GpuName = Annotated[
    str, typer.Option("--gpu", metavar="NAME", help="By catalogue.", rich_help_panel=_HARDWARE)
]
GpuCount = Annotated[
    int,
    typer.Option("--count", "-n", metavar="N", help="GPUs, one stage each.", min=1,
                 rich_help_panel=_HARDWARE),
]  # fmt: skip
ModelName = Annotated[
    str,
    typer.Option(
        "--model",
        metavar="NAME|DIR",
        help="By catalogue, or a folder with a config.json.",
        rich_help_panel=_HARDWARE,
    ),
]
CatalogueFile = Annotated[
    Path | None,
    typer.Option(
        "--catalogue",
        metavar="FILE.toml",
        help="More GPUs and models.",
        rich_help_panel=_HARDWARE,
    ),
]
HostMemory = Annotated[
    str,
    typer.Option(
        "--kv-offloading-size",
        metavar="SIZE",
        help="Host memory for KV, all stages together; 0 turns offloading off.",
        rich_help_panel=_HARDWARE,
    ),
]
GpusPerUplink = Annotated[
    int,
    typer.Option(min=1, help="GPUs that share one host link.", rich_help_panel=_HARDWARE),
]
Bits = Annotated[
    str,
    typer.Option(
        metavar="WEIGHTS/KV",
        help="Bits per weight and per KV element. Weights of fewer bits are only read faster; they "
        "compute at the rate of bfloat16.",
        rich_help_panel=_HARDWARE,
    ),
]
WorkloadText = Annotated[
    str,
    typer.Option(
        "--workload",
        metavar="NAME|IN,OUT|FILE",
        help="sharegpt, longbench, two mean lengths, or JSONL lines with prompt_tokens and "
        "output_tokens.",
        rich_help_panel=_LOAD,
    ),
]
NumRequests = Annotated[
    int,
    typer.Option(
        "--requests",
        metavar="N",
        help="Submitted at once. At most so many lines of a file.",
        min=1,
        rich_help_panel=_LOAD,
    ),
]
Sigma = Annotated[
    float,
    typer.Option(
        help="Spread of drawn lengths: standard deviation of their logarithm.",
        rich_help_panel=_LOAD,
    ),
]
Seed = Annotated[
    int, typer.Option(metavar="N", help="Of lengths and jitter.", rich_help_panel=_LOAD)
]
BlockSize = Annotated[
    int,
    typer.Option(
        min=1,
        max=256,
        help="Tokens per KV block. Larger ones simulate faster and hold less in small pools.",
        rich_help_panel=_SCHEDULE,
    ),
]
Staircase = Annotated[
    bool,
    typer.Option(
        "--gemm-staircase",
        help="GEMM cost climbs in steps of 128 tokens, as measured on an L20.",
        rich_help_panel=_ASSUME,
    ),
]


def simulate(
    gpu: GpuName = "rtx-3090",
    count: GpuCount = 8,
    model: ModelName = "llama-2-70b",
    catalogue: CatalogueFile = None,
    kv_offloading_size: HostMemory = "400GB",
    gpus_per_uplink: GpusPerUplink = 1,
    bits: Bits = "16/16",
    workload: WorkloadText = "sharegpt",
    requests: NumRequests = 1000,
    sigma: Sigma = 0.8,
    seed: Seed = 0,
    policy: Annotated[
        str | None,
        typer.Option(
            help="Selection policy: oldest-first, pipemax, fcfs, count-balanced or "
            "static-prefetch:<fraction>.",
            show_default="the scheduler's",
            rich_help_panel=_SCHEDULE,
        ),
    ] = None,
    block_size: BlockSize = 32,
    max_num_seqs: Annotated[
        int, typer.Option(min=1, help="Requests in a micro-batch.", rich_help_panel=_SCHEDULE)
    ] = 1024,
    max_num_batched_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens in a micro-batch.", rich_help_panel=_SCHEDULE)
    ] = 2048,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare", help="Run it without offloading as well.", rich_help_panel=_SCHEDULE
        ),
    ] = False,
    horizon: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            help="Stop at this simulated time.",
            show_default="when all requests are done",
            rich_help_panel=_ASSUME,
        ),
    ] = None,
    warm_up: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            min=0.0,
            help="The rate while requests wait counts from here on.",
            rich_help_panel=_ASSUME,
        ),
    ] = 0.0,
    gemm_staircase: Staircase = False,
    link_jitter: Annotated[
        float,
        typer.Option(help="Standard deviation of copies, as a share.", rich_help_panel=_ASSUME),
    ] = 0.0,
    compute_jitter: Annotated[
        float,
        typer.Option(help="Standard deviation of steps, as a share.", rich_help_panel=_ASSUME),
    ] = 0.0,
    fault: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KIND[:STAGE]@S[+S][xFACTOR]",
            help="crash-stage, crash-daemon, slow-link or slow-stage, at a time, for a time, at a "
            "share of its speed: crash-stage:3@120+5, slow-link:2@60+30x0.25. Repeatable.",
            rich_help_panel=_ASSUME,
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON array.", rich_help_panel=_OUTPUT)
    ] = False,
    svg: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Draw stages × time and KV residency. Runs the simulation twice.",
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    window: Annotated[
        str | None,
        typer.Option(
            metavar="FROM,TO",
            help="Seconds of the run that --svg shows step by step.",
            show_default="three rounds when most requests run",
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
) -> None:
    """Simulate a pipeline: the real scheduler and KV daemon on modelled GPUs and links.

    Compute and link times come from the data sheets of the catalogue and efficiencies measured by
    others; the same flags give the same result. Needs no GPU and no weights.
    """
    from pipemax.services.simulator.command import SimulateFlags, run_simulate

    flags = SimulateFlags(
        gpu=gpu,
        count=count,
        model=model,
        catalogue=catalogue,
        kv_offloading_size=kv_offloading_size,
        gpus_per_uplink=gpus_per_uplink,
        bits=bits,
        workload=workload,
        requests=requests,
        sigma=sigma,
        seed=seed,
        block_size=block_size,
        gemm_staircase=gemm_staircase,
        policy=policy,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        horizon_s=horizon,
        warm_up_s=warm_up,
        link_jitter=link_jitter,
        compute_jitter=compute_jitter,
        faults=tuple(fault or ()),
    )
    run_simulate(flags, compare=compare, as_json=as_json, svg=svg, window=window)
