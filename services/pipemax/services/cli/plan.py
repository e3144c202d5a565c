"""`pipemax plan`"""

from typing import Annotated

import typer

from pipemax.services.cli.flag_group import takes
from pipemax.services.cli.simulation_flags import PlanFlags


@takes(PlanFlags)
def plan(
    flags: PlanFlags,
    simulate: Annotated[
        bool,
        typer.Option(
            "--simulate/--no-simulate",
            help="Put the rates of a short simulation beside those of the closed form; takes some "
            "seconds.",
        ),
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Say how a model would lie on some GPUs, how fast it would be and whether offloading pays.

    A closed form: every request at the mean context, all memory in use, prefill and decode in
    turns. Beside it, what the real scheduler makes of some of the requests in a short simulation;
    for all of them, faults and comparisons: `pipemax simulate` with the same flags.
    """
    import json

    from rich.console import Console

    from pipemax.services.simulator.command import build_spec
    from pipemax.services.simulator.planning import make_plan, plan_data, plan_view
    from pipemax.services.simulator.short_run import short_run

    made = make_plan(build_spec(flags))
    simulated = None
    if simulate:
        with Console(stderr=True).status("simulating") as status:
            simulated = short_run(made, status.update)
    if as_json:
        typer.echo(json.dumps(plan_data(made, simulated)))
    else:
        Console().print(plan_view(made, simulated), highlight=False)
