"""`pipemax run-batch`"""

from pathlib import Path
from typing import Annotated

import typer

from pipemax.services.cli.options import EngineOptions, takes_engine_options


@takes_engine_options
def run_batch(
    engine: EngineOptions,
    input_file: Annotated[
        Path,
        typer.Option("--input-file", "-i", metavar="IN.jsonl", help="OpenAI batch lines."),
    ],
    output_file: Annotated[
        Path,
        typer.Option(
            "--output-file",
            "-o",
            metavar="OUT.jsonl",
            help="One result per line, in the order in which they finish. Overwritten.",
        ),
    ],
    name: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Use the running system of this name; if there is none, start one under it.",
            show_default="a system of its own with --model, else the running default",
        ),
    ] = None,
) -> None:
    """Run a file of OpenAI batch requests, starting and stopping a system for it if need be.

    A line that cannot be served gets an error line and the others go on; the exit status is 1 when
    none could.
    """
    from pipemax.services.batch import run_batch_file

    run_batch_file(engine, input_file, output_file, name)
