"""`pipemax bench`"""

import typer

from pipemax.services.cli import bench_parts
from pipemax.services.cli.bench_flags import LimitFlags, ThroughputFlags
from pipemax.services.cli.bench_parts import AsJson, OutputJson
from pipemax.services.cli.flag_group import takes

bench = typer.Typer(
    help="Measure throughput beside the machine's limit and other engines, and the parts alone.",
    no_args_is_help=True,
    add_completion=False,
)


@bench.command()
@takes(ThroughputFlags)
def throughput(
    flags: ThroughputFlags, as_json: AsJson = False, output_json: OutputJson = None
) -> None:
    """Start a system, run requests of exact lengths, and print its throughput.

    All of PipeMax is in the time, coordinator, KV daemon, sampling and detokenisation; starting
    the system and a short warm-up are not. Without --model, a Llama of 121 million parameters
    with random weights is made.
    """
    from pipemax.services.bench.command import run_throughput

    run_throughput(flags, as_json=as_json, output_json=output_json)


@bench.command()
@takes(LimitFlags)
def limit(flags: LimitFlags, as_json: AsJson = False, output_json: OutputJson = None) -> None:
    """Measure how fast this machine's cores multiply matrices and read memory, and say how fast
    any engine could run the requests on them: step by step, under the ideal schedule.
    """
    from pipemax.services.bench.limit_command import run_limit

    run_limit(flags, as_json=as_json, output_json=output_json)


for _part in (
    bench_parts.kernels,
    bench_parts.transfers,
    bench_parts.coordinator,
    bench_parts.sampler,
):
    bench.command()(_part)
