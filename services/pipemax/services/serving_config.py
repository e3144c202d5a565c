"""What `pipemax up` adds to a configuration: who is let in, and what is kept for them."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

import msgspec

from pipemax.proto.config import EngineConfig
from pipemax.proto.errors import ConfigError
from pipemax.proto.key_files import load_server
from pipemax.proto.rundir import TCP_PATTERN
from pipemax.services.cli.where import KEYS_VARIABLE
from pipemax.services.config_limits import name_the_flag, size_of

_HIGHEST_PORT = 65535


@dataclass(frozen=True, slots=True)
class ServingOptions:
    """What a user asked for, not yet validated."""

    listen: str | None
    keys: Path | None
    max_jobs: int
    max_journal_size: str


def serving_config(options: ServingOptions, config: EngineConfig) -> EngineConfig:
    """Raises ConfigError naming the flag, the value and what would work."""
    values = msgspec.to_builtins(config) | {
        "listen": options.listen,
        "keys_dir": _keys_dir(options),
        "max_jobs": options.max_jobs,
        "max_journal_bytes": size_of("--max-journal-size", options.max_journal_size),
    }
    try:
        return msgspec.convert(values, EngineConfig)
    except msgspec.ValidationError as error:
        raise name_the_flag(error, values, EngineConfig) from error


def _keys_dir(options: ServingOptions) -> str | None:
    """Of a system that listens, with a key for it."""
    listen, keys = options.listen, options.keys
    if listen is None:
        if keys is not None:
            raise ConfigError(f"--keys {keys} goes with --listen tcp://HOST:PORT")
        return None
    if not re.fullmatch(TCP_PATTERN, listen) or int(listen.rpartition(":")[2]) > _HIGHEST_PORT:
        raise ConfigError(
            f"--listen {listen:.200}: write tcp://HOST:PORT, as in tcp://0.0.0.0:5700"
        )
    if keys is None and (text := os.environ.get(KEYS_VARIABLE)):
        keys = Path(text)
    if keys is None:
        raise ConfigError(
            f"--listen {listen} needs --keys DIR: plain TCP is refused; make the folder with "
            "`pipemax keys init --keys DIR`"
        )
    folder = keys.expanduser().absolute()
    load_server(folder)
    return str(folder)
