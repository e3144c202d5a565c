"""Parquet files. The library is imported with the first of them: all else works without it."""

import importlib
from pathlib import Path
from typing import Any

from pipemax.proto.errors import ConfigError


def library(path: Path) -> Any:
    """pyarrow.parquet, for `path`. Raises ConfigError when it is not installed."""
    try:
        return importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise ConfigError(
            f"{path}: Parquet files need pyarrow; install pipemax[parquet], or give .jsonl"
        ) from error
