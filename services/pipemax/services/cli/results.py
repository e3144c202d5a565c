"""`pipemax results`"""

from pathlib import Path
from typing import Annotated

import typer

from pipemax.services.cli.where import WhereOptions, takes_where


@takes_where
def results(
    where: WhereOptions,
    job: Annotated[str, typer.Argument(metavar="JOB", help="Name of the job.")],
    output_file: Annotated[
        Path,
        typer.Option(
            "--output-file",
            "-o",
            metavar="OUT.jsonl",
            help="One result per line, in the order in which they were finished: .jsonl, .gz, "
            ".zst, .parquet, or - for standard output.",
        ),
    ],
    follow: Annotated[
        bool, typer.Option("--follow", help="Wait for the results that are still to come.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start over and lose what the output holds.")
    ] = False,
    journal: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Read a journal that no system uses, such as a damaged one that was moved away.",
        ),
    ] = None,
) -> None:
    """Fetch a job's results as OpenAI batch lines.

    Run again, it appends what has come since: every request gets its line exactly once, also if it
    was interrupted. Results are kept until the job is deleted, and can be fetched from a system
    that is not running.
    """
    from pipemax.services.batch.outputs import STDOUT, working_file
    from pipemax.services.jobs.results import fetch, source_of

    def tell(line: str) -> None:
        typer.echo(line, err=True)

    with source_of(where.system, journal, tell) as source:
        fetched = fetch(source, job, output_file, follow=follow, overwrite=overwrite)
    state, left = fetched.job.state, fetched.job.num_requests - fetched.lines
    failed = f", {fetched.failed} of them error lines" if fetched.failed else ""
    before = f"; {fetched.lines - fetched.new} were there" if fetched.lines > fetched.new else ""
    typer.echo(f"{fetched.new} results in {output_file}{failed}{before}", err=output_file == STDOUT)
    if state == "cancelled" and left:
        tell(f"{job} was cancelled: {left} requests have no result")
    elif left or state == "open":
        there = working_file(output_file)
        packed = f"; until all are there, lines are in {there}" if there != output_file else ""
        tell(f"{job} is {state}, {left} requests have no result yet: run it again{packed}")
