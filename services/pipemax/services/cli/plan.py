"""`pipemax plan`"""

from typing import Annotated

import typer

from pipemax.services.cli.flag_group import takes
from pipemax.services.cli.simulation_flags import PlanFlags


@takes(PlanFlags)
def plan(
    flags: PlanFlags,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Say how a model would lie on some GPUs, how fast it would be and whether offloading pays.

    A closed form: every request at the mean context, all memory in use, prefill and decode in
    turns. It answers at once; `pipemax simulate` with the same flags runs the real scheduler.
    """
    from rich.console import Console

    from pipemax.services.simulator.command import build_spec
    from pipemax.services.simulator.planning import make_plan, plan_data, plan_view

    made = make_plan(build_spec(flags))
    if as_json:
        import json

        typer.echo(json.dumps(plan_data(made)))
    else:
        Console().print(plan_view(made), highlight=False)
