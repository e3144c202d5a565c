"""What all benchmarks print, and what they record of the machine beside it."""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import typer

from pipemax.services.machine import memory_bytes, usable_cores

_PACKAGES = ("pipemax", "torch", "transformers", "numpy", "numba")


def surroundings() -> dict[str, Any]:
    """Of a measurement, so that nobody compares what cannot be: versions, machine, what else it
    was doing."""
    return {
        "versions": {name: _version(name) for name in _PACKAGES}
        | {"python": platform.python_version()},
        "machine": {
            "processor": platform.machine(),
            "cores": usable_cores(),
            "memory_bytes": memory_bytes(),
            "load_average": list(os.getloadavg()),
        },
    }


def show(
    lines: Sequence[str], data: Mapping[str, Any], *, as_json: bool, output_json: Path | None
) -> None:
    """Text, or with `as_json` one JSON object, on standard output; the object in a file, too."""
    text = json.dumps(data)
    if output_json is not None:
        output_json.write_text(text + "\n", encoding="utf-8")
    typer.echo(text if as_json else "\n".join(lines))


def tell(line: str) -> None:
    """How it gets on; results alone go to standard output."""
    typer.echo(line, err=True)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
