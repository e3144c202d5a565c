"""The run directory: one system's sockets, configuration, logs and lock.

`<root>/<name>/`, mode 0700, where root is `$PIPEMAX_RUNTIME_DIR`, else `$XDG_RUNTIME_DIR/pipemax`,
else `/tmp/pipemax-<uid>`. A second bind on a Unix socket silently steals it, so whoever launches
holds the lock file; the lock is the kernel's and goes with the process.
"""

import fcntl
import os
import re
import stat
import tempfile
import time
from pathlib import Path

from pipemax.proto.errors import AlreadyRunningError, ConfigError

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,39}$"
"""Of a system's name, which is also its folder's."""
TCP_PATTERN = r"^tcp://([A-Za-z0-9.*_-]+|\[[0-9A-Fa-f:.%A-Za-z0-9]+\]):[0-9]{1,5}\Z"
"""Of a place that clients of other machines connect to."""
LOCK_FILE = "lock"
METRICS_PORT_FILE = "metrics.port"
INGEST_ENDPOINT_FILE = "ingest.endpoint"
"""Where clients of other machines connect to, if there is such a place."""
LOG_DIR = "logs"
MAX_SOCKET_PATH_BYTES = 107
_LOCK_ATTEMPTS = 20
_LOCK_RETRY_S = 0.01


def runtime_root() -> Path:
    explicit = os.environ.get("PIPEMAX_RUNTIME_DIR")
    if explicit:
        return Path(explicit).absolute()
    session = os.environ.get("XDG_RUNTIME_DIR")
    if session and Path(session).is_dir():
        return Path(session) / "pipemax"
    return Path(tempfile.gettempdir()) / f"pipemax-{os.getuid()}"


def run_dir_of(name: str) -> Path:
    """Where the system `name` lives, whether it runs or not. Raises ConfigError for what is no
    name, such as a path."""
    if not re.fullmatch(NAME_PATTERN, name):
        raise ConfigError(
            f"--name {name}: use at most 40 letters, digits, dots, dashes and underscores"
        )
    return runtime_root() / name


def make_private_dir(path: Path) -> None:
    """Creates `path` with mode 0700, or checks that it is ours and private."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise ConfigError(f"{path} is not a directory of ours; set PIPEMAX_RUNTIME_DIR to one")
    if found.st_mode & 0o077:
        raise ConfigError(
            f"{path} is open to other users (mode {stat.S_IMODE(found.st_mode):o}); "
            "set PIPEMAX_RUNTIME_DIR to a folder of mode 700"
        )


def create_run_dir(name: str) -> Path:
    """The run directory of `name`, made ready. Raises ConfigError when it cannot be used."""
    root = runtime_root()
    path = root / name
    longest = os.fsencode(path / "control.sock")
    if len(longest) > MAX_SOCKET_PATH_BYTES:
        raise ConfigError(
            f"run directory {path} is too long for Unix sockets "
            f"({len(longest)} > {MAX_SOCKET_PATH_BYTES} bytes); "
            "set PIPEMAX_RUNTIME_DIR to a shorter one"
        )
    try:
        make_private_dir(root)
        make_private_dir(path)
        (path / LOG_DIR).mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"cannot make run directory {path}: {error}; "
            "set PIPEMAX_RUNTIME_DIR to a writable folder"
        ) from error
    return path


class RunLock:
    """Held by the launcher for the life of the system; the file holds its pid."""

    def __init__(self, run_dir: Path) -> None:
        """Raises AlreadyRunningError when another launcher holds it."""
        self._fd = os.open(run_dir / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            _lock_exclusively(self._fd)
        except OSError as error:
            pid = os.pread(self._fd, 32, 0).decode(errors="replace").strip()
            os.close(self._fd)
            raise AlreadyRunningError(
                f"a system named {run_dir.name!r} is already running (launcher pid {pid}); "
                f"use another --name, or stop it with `pipemax down --name {run_dir.name}`"
            ) from error
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        if self._fd >= 0:
            os.ftruncate(self._fd, 0)
            os.close(self._fd)
            self._fd = -1


def _lock_exclusively(fd: int) -> None:
    """Raises OSError when a launcher holds the lock. Tries for a moment: `launcher_pid` in another
    process holds it too, for as long as two system calls take."""
    for attempt in range(_LOCK_ATTEMPTS):
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError:
            if attempt == _LOCK_ATTEMPTS - 1:
                raise
            time.sleep(_LOCK_RETRY_S)


def launcher_pid(run_dir: Path) -> int | None:
    """Pid of the live launcher holding the lock, None when nobody does."""
    try:
        fd = os.open(run_dir / LOCK_FILE, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        try:
            # Shared, so that two who ask at once do not take each other for the launcher.
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            text = os.pread(fd, 32, 0).decode(errors="replace").strip()
            return int(text) if text.isdigit() else None
        return None
    finally:
        os.close(fd)


def socket_endpoint(run_dir: Path, name: str) -> str:
    """ZeroMQ endpoint of the socket `name` (`ingest`, `control`, `kv`, `act-<stage>`)."""
    return f"ipc://{run_dir / name}.sock"
