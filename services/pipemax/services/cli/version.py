"""`pipemax version`"""

import typer


def version() -> None:
    """Print the version of PipeMax."""
    from importlib.metadata import version as version_of

    typer.echo(version_of("pipemax"))
