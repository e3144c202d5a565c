"""`pipemax cancel`"""

from typing import Annotated

import typer

from pipemax.services.cli.where import WhereOptions, takes_where


@takes_where
def cancel(
    where: WhereOptions,
    job: Annotated[str, typer.Argument(metavar="JOB", help="Name of the job.")],
) -> None:
    """Give up a job's unfinished requests. Results that are there can still be fetched."""
    from pipemax.services.jobs.control import cancel_job

    found = cancel_job(where.system, job)
    typer.echo(
        f"{job} is {found.state}: {found.num_results} of {found.num_requests} requests have results"
    )
