"""`pipemax demo`"""

from pathlib import Path
from typing import Annotated

import typer


def demo(
    keep: Annotated[
        Path | None,
        typer.Option("--keep", metavar="DIR", help="Keep model, requests and results here."),
    ] = None,
) -> None:
    """Run a small model over two stages whose device KV is too small, and show where KV went."""
    from pipemax.services.demo import run_demo

    run_demo(keep)
