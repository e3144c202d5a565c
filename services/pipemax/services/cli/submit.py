"""`pipemax submit`"""

from pathlib import Path
from typing import Annotated

import typer

from pipemax.services.cli.options import RequestTimeout
from pipemax.services.cli.where import WhereOptions, takes_where


@takes_where
def submit(
    where: WhereOptions,
    input_file: Annotated[
        list[Path],
        typer.Option(
            "--input-file",
            "-i",
            metavar="IN.jsonl",
            help="OpenAI batch lines: .jsonl, .gz, .zst, .parquet, or - for standard input; may be "
            "given several times, for one job.",
        ),
    ],
    job: Annotated[
        str | None,
        typer.Option(
            metavar="JOB", help="Name of the job.", show_default="made of the file's name and hash"
        ),
    ] = None,
    request_timeout: RequestTimeout = None,
) -> None:
    """Hand files of OpenAI batch requests to a running system as a job, and leave.

    The system keeps the job on disk and finishes it, also when it is stopped and started again, or
    crashes. Interrupted, run it again: what was handed over is not handed over twice. A line that
    cannot be run gets an error line among the results.
    """
    from pipemax.services.config_limits import request_timeout as check_timeout
    from pipemax.services.jobs.submit import submit_files

    timeout_s = check_timeout(request_timeout)
    found, before = submit_files(where.system, input_file, job, timeout_s)
    if before == found.num_requests and before:
        typer.echo(f"{found.name} was submitted before and is {found.state}", err=True)
    else:
        there = f", {before} of them before" if before else ""
        typer.echo(f"{found.num_requests} requests submitted{there}", err=True)
        typer.echo(f"fetch results with `pipemax results {found.name} -o OUT.jsonl`", err=True)
    typer.echo(found.name)
