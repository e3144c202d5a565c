"""`pipemax up`"""

import typer

from pipemax.services.cli.options import (
    DEFAULT_NAME,
    EngineOptions,
    SystemName,
    takes_engine_options,
)


@takes_engine_options
def up(engine: EngineOptions, name: SystemName = DEFAULT_NAME) -> None:
    """Start a system and keep it running until Ctrl-C or `pipemax down`.

    Ctrl-C and SIGTERM finish the accepted requests first; a second one stops at once.
    """
    from pipemax.services.engine_config import build_config
    from pipemax.services.foreground import run_until_stopped
    from pipemax.services.launcher.supervisor import Policy
    from pipemax.services.launcher.system import System

    def tell(line: str) -> None:
        typer.echo(line, err=True)

    config = build_config(engine, name, tell)
    policy = Policy(ready_timeout_s=engine.ready_timeout)
    run_until_stopped(System(config, policy=policy, on_notice=tell))
