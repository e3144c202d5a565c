"""`pipemax trace`"""

from pathlib import Path
from typing import Annotated

import typer

from pipemax.services.cli.where import WhereOptions, takes_where


@takes_where
def trace(
    where: WhereOptions,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE.json", help="Where to write it.")
    ] = Path("trace.json"),
    seconds: Annotated[
        float,
        typer.Option(metavar="SECONDS", help="How long to record.", min=0.1, max=3600.0),
    ] = 5.0,
) -> None:
    """Record what every stage does, span by span, and every KV copy.

    The file is for https://ui.perfetto.dev (which reads it in your browser) or chrome://tracing.
    """
    from rich.console import Console

    from pipemax.services.trace.command import copies_line, record, summary

    typer.echo(f"recording for {seconds:g} s", err=True)
    found = record(where.system, seconds, output)
    Console().print(summary(found))
    typer.echo(f"{output}: {copies_line(found)}; open it in https://ui.perfetto.dev")
