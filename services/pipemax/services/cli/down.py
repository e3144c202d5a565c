"""`pipemax down`"""

import contextlib
import os
import signal
import time
from typing import Annotated

import typer

from pipemax.proto.errors import NotRunningError
from pipemax.proto.rundir import launcher_pid, run_dir_of
from pipemax.services.cli.options import DEFAULT_NAME, SystemName

_POLL_S = 0.1


def down(
    name: SystemName = DEFAULT_NAME,
    now: Annotated[
        bool, typer.Option("--now", help="Do not finish the requests that were accepted.")
    ] = False,
) -> None:
    """Stop a running system after it has finished the requests it accepted."""
    run_dir = run_dir_of(name)
    pid = launcher_pid(run_dir)
    if pid is None:
        raise NotRunningError(f"no system named {name!r} is running; nothing to stop")
    with contextlib.suppress(ProcessLookupError):  # it left between the two calls: all the better
        os.kill(pid, signal.SIGQUIT if now else signal.SIGTERM)
    while launcher_pid(run_dir) == pid:
        time.sleep(_POLL_S)
    typer.echo(f"{name} stopped")
