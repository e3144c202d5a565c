"""`pipemax jobs`"""

import time
from typing import Annotated

import typer

from pipemax.proto.errors import ConfigError
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
    delete_older_than: Annotated[
        str | None,
        typer.Option(
            metavar="AGE",
            help="Forget all finished or cancelled jobs that ended so long ago: 7d, 12h, 30min.",
        ),
    ] = None,
    retry: Annotated[
        str | None,
        typer.Option(
            metavar="JOB",
            help="Run the requests of a finished or cancelled job that failed again, as another "
            "job, whose name is printed. Lines that could not be read are not among them.",
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="A JSON list, for programs. Times are Unix time.")
    ] = False,
) -> None:
    """List the jobs of a system: how far they are, and what they came to; run what failed again.

    A job is `open` while requests are handed over, then `running`, `finished` or `cancelled`;
    `held` is one that was submitted to another model and waits for it.
    """
    import msgspec
    from rich.console import Console

    from pipemax.services.jobs.control import all_jobs, delete_job, delete_old_jobs, retry_job
    from pipemax.services.jobs.table import as_json as plain
    from pipemax.services.jobs.table import job_table

    system = where.system
    if sum(given is not None for given in (delete, delete_older_than, retry)) > 1:
        raise ConfigError("--delete, --delete-older-than and --retry exclude each other")
    if retry is not None:
        made = retry_job(system, retry)
        typer.echo(f"{made.num_requests} failed requests of {retry} are run again", err=True)
        typer.echo(f"fetch results with `pipemax results {made.name} -o OUT.jsonl`", err=True)
        typer.echo(made.name)
        return
    if delete_older_than is not None:
        names = delete_old_jobs(system, delete_older_than, time.time())
        typer.echo(f"{len(names)} jobs deleted{': ' if names else ''}{', '.join(names)}", err=True)
        return
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
