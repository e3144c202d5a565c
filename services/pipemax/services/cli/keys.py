"""`pipemax keys`"""

from pathlib import Path
from typing import Annotated

import typer

from pipemax.services.cli.where import KEYS_VARIABLE

KeyFolder = Annotated[
    Path,
    typer.Option(
        "--keys",
        metavar="DIR",
        envvar=KEYS_VARIABLE,
        show_envvar=True,
        help="The system's key folder.",
    ),
]
ClientName = Annotated[str, typer.Argument(metavar="NAME", help="The client's name, for people.")]

keys = typer.Typer(
    help="Make and look after the keys by which clients on other machines are let in.",
    no_args_is_help=True,
    add_completion=False,
)


@keys.command()
def init(folder: KeyFolder) -> None:
    """Make a key for a system. Nobody is let in yet.

    The folder stays on the system's machine: `pipemax up --listen tcp://HOST:PORT --keys DIR`.
    """
    from pipemax.services.keys import create

    create(folder)
    typer.echo(f"{folder}: a system's key; server.key is a secret and stays here", err=True)
    typer.echo(f"let a client in with `pipemax keys add NAME --keys {folder}`", err=True)


@keys.command()
def add(name: ClientName, folder: KeyFolder) -> None:
    """Let a client in: make its keys, and a folder to be moved to its machine.

    Counts at once, also for a system that runs.
    """
    from pipemax.services.keys import add as add_client

    issued = add_client(folder, name)
    typer.echo(
        f"move this folder to {name}'s machine over a safe way, and delete it here: client.key in "
        "it is a secret; there, give it as --keys, with --connect tcp://HOST:PORT",
        err=True,
    )
    typer.echo(issued)


@keys.command()
def remove(name: ClientName, folder: KeyFolder) -> None:
    """Let a client in no more.

    Counts from its next connection on, also for a system that runs; one that stands stays until
    the client or the system ends it.
    """
    from pipemax.services.keys import remove as remove_client

    remove_client(folder, name)
    typer.echo(f"{name} is not let in any more", err=True)


@keys.command(name="list")
def show(folder: KeyFolder) -> None:
    """List the clients that are let in, and which file belongs where."""
    from pipemax.services.keys import clients

    found = clients(folder)
    for client in found:
        key = client.public_key or "no key: its file is not readable, nobody is let in by it"
        there = f"  not moved to its machine yet: {client.issued}" if client.issued else ""
        typer.echo(f"{client.name}  {key}{there}")
    if not found:
        typer.echo("nobody is let in", err=True)
    typer.echo(
        f"here stay: {folder / 'server.key'} (secret), {folder / 'clients'} (public keys, one file "
        "for each client); to a client's machine go its client.key (secret) and server.pub",
        err=True,
    )
