"""`pipemax status`"""

import time
from typing import TYPE_CHECKING, Annotated

import typer

from pipemax.services.cli.where import WhereOptions, takes_where

if TYPE_CHECKING:
    from pipemax.client import Client

_WATCH_EVERY_S = 1.0


@takes_where
def status(
    where: WhereOptions,
    watch: Annotated[
        bool, typer.Option("--watch", help="The pipeline at a glance, every second until Ctrl-C.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object per look, for programs.")
    ] = False,
) -> None:
    """Show what a running system does: requests, tokens, KV by tier, each stage's time by state."""
    system = where.system
    with system.client("status") as client:
        if as_json:
            _print_json(client, watch)
        else:
            _show(str(system), client, watch)


def _print_json(client: "Client", watch: bool) -> None:
    import msgspec

    typer.echo(msgspec.json.encode(client.status()))
    while watch:
        time.sleep(_WATCH_EVERY_S)
        typer.echo(msgspec.json.encode(client.status()))


def _show(name: str, client: "Client", watch: bool) -> None:
    from rich.console import Console
    from rich.live import Live

    from pipemax.services.status_view import status_view
    from pipemax.services.status_watch import Watch

    console = Console()
    if not watch:
        console.print(status_view(name, client.status()))
        return
    seen = Watch(name)
    with Live(seen.look(client.status()), console=console, auto_refresh=False) as live:
        while True:
            time.sleep(_WATCH_EVERY_S)
            live.update(seen.look(client.status()), refresh=True)
