"""The flags that say which system is meant, for every command that talks to a running one."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipemax.proto.errors import ConfigError
from pipemax.services.cli.flag_group import takes
from pipemax.services.cli.options import DEFAULT_NAME

if TYPE_CHECKING:
    from pipemax.services.where import Where

CONNECT_VARIABLE = "PIPEMAX_CONNECT"
KEYS_VARIABLE = "PIPEMAX_KEYS"
_PANEL = "Which system"

Connect = Annotated[
    str | None,
    typer.Option(
        "--connect",
        metavar="tcp://HOST:PORT",
        help="A system on another machine, started with --listen.",
        show_default=f"${CONNECT_VARIABLE}",
        rich_help_panel=_PANEL,
    ),
]
Keys = Annotated[
    Path | None,
    typer.Option(
        "--keys",
        metavar="DIR",
        help="With --connect: this machine's key folder, made by `pipemax keys add`.",
        show_default=f"${KEYS_VARIABLE}",
        rich_help_panel=_PANEL,
    ),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class WhereOptions:
    """What a user asked for."""

    name: Annotated[
        str | None,
        typer.Option(
            "--name",
            metavar="NAME",
            help="Which system of this machine, where several run.",
            show_default=DEFAULT_NAME,
            rich_help_panel=_PANEL,
        ),
    ] = None
    connect: Connect = None
    keys: Keys = None

    @property
    def system(self) -> "Where":
        """Flags go before the environment. Raises ConfigError for flags that contradict each
        other."""
        from pipemax.services.where import Where

        endpoint = endpoint_of(
            self.name, self.connect, self.keys, ask_environment=self.name is None
        )
        if endpoint is None:
            return Where(self.name or DEFAULT_NAME)
        return Where(endpoint=endpoint, keys=keys_of(self.keys))


def endpoint_of(
    name: str | None, connect: str | None, keys: Path | None, *, ask_environment: bool
) -> str | None:
    """Of a system elsewhere, None when one of this machine is meant."""
    if connect is not None and name is not None:
        raise ConfigError(f"--name {name} is a system of this machine, --connect {connect} is not")
    endpoint = connect
    if endpoint is None and ask_environment:
        endpoint = os.environ.get(CONNECT_VARIABLE) or None
    if endpoint is None and keys is not None:
        raise ConfigError(f"--keys {keys} goes with --connect tcp://HOST:PORT")
    return endpoint


def keys_of(flag: Path | None) -> Path | None:
    """The folder given by the flag, else by the environment."""
    if flag is None and (text := os.environ.get(KEYS_VARIABLE)):
        return Path(text)
    return flag


takes_where = takes(WhereOptions)
"""Gives a Typer command the flags that say which system is meant."""
