"""`pipemax collect-env`: what to paste into a bug report."""

import typer


def collect_env() -> None:
    """Print versions and limits of this machine, for a bug report."""
    from pipemax.services.collect_env import describe_environment

    for name, value in describe_environment():
        typer.echo(f"{name:24} {value}")
