"""`pipemax simulate`"""

from pathlib import Path
from typing import Annotated

import typer

from pipemax.services.cli.flag_group import takes
from pipemax.services.cli.simulation_flags import SimulateFlags

_COMPARISON, _OUTPUT = "Comparison", "Output"


@takes(SimulateFlags)
def simulate(
    flags: SimulateFlags,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare", help="Run it without offloading as well.", rich_help_panel=_COMPARISON
        ),
    ] = False,
    against: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PEER,...",
            help="Run models of peers as well: vllm-pp, vllm-tp, td-pipe, seesaw. They are models "
            "of how those systems schedule, not measurements of them. Repeatable.",
            rich_help_panel=_COMPARISON,
        ),
    ] = None,
    all_reduce_gb_s: Annotated[
        float | None,
        typer.Option(
            metavar="GB/S",
            help="Bus bandwidth of the all-reduces of vllm-tp and seesaw.",
            show_default="the most that host links and host memory allow",
            rich_help_panel=_COMPARISON,
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
    from pipemax.services.simulator.command import Comparison, run_simulate

    others = Comparison(compare, tuple(against or ()), all_reduce_gb_s)
    run_simulate(flags, others, as_json=as_json, svg=svg, window=window)
