"""API keys. Only digests of them are kept, and nothing here says what they are."""

import hashlib
import hmac
import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path

from pipemax.proto.errors import ConfigError

KEY_VARIABLE = "PIPEMAX_API_KEY"
MIN_KEY_CHARS = 16
_SCHEME = "bearer"


class ApiKeys:
    """False when there are none: then no request needs one."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = tuple(_digest(key) for key in keys)

    def __bool__(self) -> bool:
        return bool(self._digests)

    def __repr__(self) -> str:
        return f"<{len(self._digests)} API keys>"

    def admit(self, authorization: str | None) -> bool:
        """Whether a header `Authorization` brings one of them. Takes as long for every wrong key,
        whatever its first characters."""
        scheme, _, given = (authorization or "").partition(" ")
        digest = _digest(given.strip())
        found = False
        for known in self._digests:
            found |= hmac.compare_digest(known, digest)
        return found and scheme.lower() == _SCHEME


NO_KEYS = ApiKeys(())


def read_keys(path: Path | None, environment: Mapping[str, str]) -> ApiKeys:
    """The keys in a file, one a line, or else the one in `$PIPEMAX_API_KEY`. Raises ConfigError for
    a file that others can read, or keys that are too short; no message quotes one."""
    if path is None:
        key = environment.get(KEY_VARIABLE)
        return ApiKeys(() if key is None else [_checked(key, f"${KEY_VARIABLE}")])
    try:
        with path.open(encoding="utf-8") as file:
            found = os.fstat(file.fileno())
            if found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
                raise ConfigError(
                    f"--api-key-file {path} must be yours and readable by nobody else: "
                    f"chmod 600 {path}"
                )
            lines = file.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise ConfigError(f"--api-key-file {path}: {reason}") from error
    keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not keys:
        raise ConfigError(f"--api-key-file {path} holds no key; write one a line")
    return ApiKeys(_checked(key, str(path)) for key in keys)


def _checked(key: str, where: str) -> str:
    if len(key) < MIN_KEY_CHARS or not key.isascii() or any(c.isspace() for c in key):
        raise ConfigError(
            f"{where}: a key has at least {MIN_KEY_CHARS} ASCII characters and no space; "
            "`openssl rand -hex 24` makes one"
        )
    return key


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogatepass")).digest()
