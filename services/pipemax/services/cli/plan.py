"""`pipemax plan`"""

from typing import Annotated

import typer

from pipemax.services.cli.simulate import (
    Bits,
    BlockSize,
    CatalogueFile,
    GpuCount,
    GpuName,
    GpusPerUplink,
    HostMemory,
    ModelName,
    NumRequests,
    Seed,
    Sigma,
    Staircase,
    WorkloadText,
)


def plan(
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
    block_size: BlockSize = 32,
    gemm_staircase: Staircase = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Say how a model would lie on some GPUs, how fast it would be and whether offloading pays.

    A closed form: every request at the mean context, all memory in use, prefill and decode in
    turns. It answers at once; `pipemax simulate` with the same flags runs the real scheduler.
    """
    from rich.console import Console

    from pipemax.services.simulator.command import SimulateFlags, build_spec
    from pipemax.services.simulator.planning import make_plan, plan_data, plan_view

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
    )
    made = make_plan(build_spec(flags))
    if as_json:
        import json

        typer.echo(json.dumps(plan_data(made)))
    else:
        Console().print(plan_view(made), highlight=False)
