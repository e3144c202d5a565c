"""`pipemax jobs`"""

import time
from typing import Annotated

import typer

from pipemax.services.cli.where import WhereOptions, takes_where


@takes_where
def jobs(
    where: WhereOptions,
    delete: Annotated[
        str | None,
        typer.Option(
            metavar="JOB", help="Forget a finished or cancelled job, and its results with it."
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="A JSON list, for programs. Times are Unix time.")
    ] = False,
) -> None:
    """List the jobs of a system: how far they are, and what they came to.

    A job is `open` while requests are handed over, then `running`, `finished` or `cancelled`;
    `held` is one that was submitted to another model and waits for it.
    """
    import msgspec
    from rich.console import Console

    from pipemax.services.jobs.control import all_jobs, delete_job
    from pipemax.services.jobs.table import as_json as plain
    from pipemax.services.jobs.table import job_table

    system = where.system
    if delete is not None:
        delete_job(system, delete)
        typer.echo(f"{delete} deleted", err=True)
        return
    found = all_jobs(system, lambda line: typer.echo(line, err=True))
    if as_json:
        typer.echo(msgspec.json.encode([plain(job) for job in found]))
    elif found:
        Console().print(job_table(found, time.time()))
    else:
        typer.echo(f"{system} has no jobs", err=True)
