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
        typer.Option("--output-file", "-o", metavar="OUT.jsonl", help="One result per line."),
    ],
    name: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Use the running system of this name; if there is none, start one under it.",
            show_default="a system of its own",
        ),
    ] = None,
) -> None:
    """Run a file of OpenAI batch requests, starting and stopping a system for it if need be."""
    from pipemax.services.batch import run_batch_file

    run_batch_file(engine, input_file, output_file, name)
