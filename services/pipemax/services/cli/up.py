"""`pipemax up`"""

from pathlib import Path
from typing import Annotated

import typer

from pipemax.services.cli.options import (
    CONFIG_DEFAULTS,
    DEFAULT_NAME,
    EngineOptions,
    SystemName,
    takes_engine_options,
)
from pipemax.services.cli.where import KEYS_VARIABLE

_DOORS, _JOBS = "Clients on other machines", "Jobs"


@takes_engine_options
def up(
    engine: EngineOptions,
    name: SystemName = DEFAULT_NAME,
    listen: Annotated[
        str | None,
        typer.Option(
            metavar="tcp://HOST:PORT",
            help="Serve clients of other machines here too, by an address of this one; encrypted, "
            "and only those whose keys are in the key folder.",
            rich_help_panel=_DOORS,
        ),
    ] = None,
    keys: Annotated[
        Path | None,
        typer.Option(
            "--keys",
            metavar="DIR",
            help="With --listen: the key folder, made by `pipemax keys init`.",
            show_default=f"${KEYS_VARIABLE}",
            rich_help_panel=_DOORS,
        ),
    ] = None,
    max_jobs: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Most jobs that are kept, finished ones included.",
            rich_help_panel=_JOBS,
        ),
    ] = CONFIG_DEFAULTS.max_jobs,
    max_journal_size: Annotated[
        str,
        typer.Option(
            metavar="SIZE",
            help="Requests and results that are kept on disk; beyond it, no more are taken.",
            rich_help_panel=_JOBS,
        ),
    ] = "256GiB",
) -> None:
    """Start a system and keep it running until Ctrl-C or `pipemax down`.

    Ctrl-C and SIGTERM finish the accepted requests first; a second one stops at once.
    """
    from pipemax.services.engine_config import build_config
    from pipemax.services.foreground import run_until_stopped
    from pipemax.services.launcher.supervisor import Policy
    from pipemax.services.launcher.system import System
    from pipemax.services.serving_config import ServingOptions, serving_config

    def tell(line: str) -> None:
        typer.echo(line, err=True)

    serving = ServingOptions(listen, keys, max_jobs, max_journal_size)
    config = serving_config(serving, build_config(engine, name, tell))
    policy = Policy(ready_timeout_s=engine.ready_timeout)
    run_until_stopped(System(config, policy=policy, on_notice=tell))
