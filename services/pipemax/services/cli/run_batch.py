"""`pipemax run-batch`"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipemax.proto.errors import ConfigError
from pipemax.services.cli.options import EngineOptions, RequestTimeout, takes_engine_options
from pipemax.services.cli.where import Connect, Keys, endpoint_of, keys_of

if TYPE_CHECKING:
    from pipemax.ray.batch import RayOptions

_RESUMING = "Going on"
_ON_RAY = "Many machines"


@takes_engine_options
def run_batch(
    engine: EngineOptions,
    input_file: Annotated[
        list[Path],
        typer.Option(
            "--input-file",
            "-i",
            metavar="IN.jsonl",
            help="OpenAI batch lines: .jsonl, .gz, .zst, .parquet, or - for standard input; may be "
            "given several times.",
        ),
    ],
    output_file: Annotated[
        list[Path],
        typer.Option(
            "--output-file",
            "-o",
            metavar="OUT.jsonl",
            help="One result per line, in the order in which they finish: .jsonl, .gz, .zst, "
            ".parquet, or - for standard output. One for all inputs, or one for each.",
        ),
    ],
    error_file: Annotated[
        Path | None,
        typer.Option(metavar="ERR.jsonl", help="Error lines go here instead of the output."),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on with an output by custom_id even where input or settings have changed. "
            "Where they have not, that is what happens anyway.",
            rich_help_panel=_RESUMING,
        ),
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Start over and lose what the output holds.",
            rich_help_panel=_RESUMING,
        ),
    ] = False,
    retry_errors: Annotated[
        bool,
        typer.Option(
            "--retry-errors",
            help="When going on, run lines again that got an error line.",
            rich_help_panel=_RESUMING,
        ),
    ] = False,
    request_timeout: RequestTimeout = None,
    name: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Use the running system of this name; if there is none, start one under it.",
            show_default="a system of its own with --model, else the running default",
        ),
    ] = None,
    connect: Connect = None,
    keys: Keys = None,
    ray_address: Annotated[
        str | None,
        typer.Option(
            metavar="auto|local|HOST:PORT",
            help="Run on a Ray cluster that this machine is a node of, with a system of its own on "
            "each node, or on each group of GPUs that --pipeline-parallel-size asks for; local: "
            "this machine alone. Needs pipemax[ray]; --model must lie there on all nodes.",
            rich_help_panel=_ON_RAY,
        ),
    ] = None,
    ray_replicas: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Systems; those that find no room wait for nodes to come.",
            show_default="as many as there is room for",
            rich_help_panel=_ON_RAY,
        ),
    ] = None,
    ray_batch_size: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Requests handed over at a time, in steps of 8. Several batches are in a replica "
            "at once, with twice as many requests as it can run.",
            show_default="half of what a replica can run at once, or an eighth of its share",
            rich_help_panel=_ON_RAY,
        ),
    ] = None,
) -> None:
    """Run files of OpenAI batch requests, starting and stopping a system for it if need be.

    Run again after whatever stopped it, it goes on where it was. A line that cannot be served gets
    an error line and the others go on; the exit status is 1 when none could.
    """
    from pipemax.services.batch.command import run_batch_files
    from pipemax.services.batch.files import BatchFiles
    from pipemax.services.config_limits import request_timeout as check_timeout
    from pipemax.services.where import Where

    starts_its_own = name or engine.model  # which a variable of the environment does not change
    endpoint = endpoint_of(name, connect, keys, ask_environment=not starts_its_own)
    elsewhere = None if endpoint is None else Where(endpoint=endpoint, keys=keys_of(keys))
    files = BatchFiles(
        inputs=tuple(input_file),
        outputs=tuple(output_file),
        errors=error_file,
        resume=resume,
        overwrite=overwrite,
        retry_errors=retry_errors,
    )
    timeout_s = check_timeout(request_timeout)
    on_ray = _on_ray(ray_address, ray_replicas, ray_batch_size)
    if on_ray is not None and (name is not None or elsewhere is not None):
        raise ConfigError(
            f"--ray-address {ray_address} starts systems of its own, --name and --connect use one "
            "that runs; give one of them"
        )
    run_batch_files(engine, files, name, elsewhere, timeout_s, on_ray)


def _on_ray(
    address: str | None, replicas: int | None, batch_size: int | None
) -> "RayOptions | None":
    if address is None:
        for flag, number in (("replicas", replicas), ("batch-size", batch_size)):
            if number is not None:
                raise ConfigError(f"--ray-{flag} {number} goes with --ray-address")
        return None
    from pipemax.ray.batch import RayOptions

    return RayOptions(address, replicas, batch_size)
