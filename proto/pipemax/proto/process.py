"""What every process of the system does at its start: take a name, log, leave with the launcher."""

import argparse
import contextlib
import ctypes
import logging
import os
import resource
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from pipemax.proto.errors import ConfigError, PipemaxError

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
EXIT_LAUNCHER_GONE = 70
EXIT_FATAL = 78
"""The process said in its error file why it cannot work; starting it again would not help."""

_LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")

log = logging.getLogger(__name__)


class ProcessBody(Protocol):
    """What a process does; returns when told to stop, raises PipemaxError when it cannot work."""

    def __call__(self, run_dir: Path, index: int) -> None: ...


def error_file(run_dir: Path, process: str) -> Path:
    """Where a process that exits with EXIT_FATAL leaves its one-line reason."""
    return run_dir / f"{process}.error"


def run_process(
    process: str, body: ProcessBody, run_dir: Path, index: int, parent_pipe_fd: int | None
) -> int:
    """Runs `body` as the process named `process` (`coordinator`, `kv-daemon`, `stage-0`): OS name,
    logging, watch on the launcher, one-line reason on failure. Returns the exit status."""
    set_process_name(f"pm-{process}")
    leave_with_parent(parent_pipe_fd)
    raise_fd_limit()
    error_file(run_dir, process).unlink(missing_ok=True)
    try:
        set_up_logging(process)
        body(run_dir, index)
    except PipemaxError as error:
        log.error("%s", error)
        with contextlib.suppress(OSError):  # no run directory: the line above says what is wrong
            error_file(run_dir, process).write_text(" ".join(str(error).split()) + "\n")
        return EXIT_FATAL
    except Exception:
        log.exception("unexpected failure")
        return 1
    return 0


def process_main(process: str, body: ProcessBody, argv: list[str] | None = None) -> int:
    """Command line of a process: `--run-dir D [--index I] [--parent-pipe-fd N]`. A process of
    which there are several gets its index appended to its name."""
    parser = argparse.ArgumentParser(prog=process)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--index", type=int)
    parser.add_argument("--parent-pipe-fd", type=int)
    options = parser.parse_args(argv)
    name = process if options.index is None else f"{process}-{options.index}"
    return run_process(name, body, options.run_dir, options.index or 0, options.parent_pipe_fd)


def set_process_name(name: str) -> None:
    """Name shown by `ps` and `top` (first 15 bytes)."""
    _prctl(_PR_SET_NAME, ctypes.create_string_buffer(name.encode()[:15]))


def leave_with_parent(parent_pipe_fd: int | None) -> None:
    """Ends this process when the launcher dies, however it dies.

    The launcher keeps the write end of a pipe open; end-of-file on our end means it is gone. The
    parent-death signal covers the time in which no thread can run. None does nothing.
    """
    if parent_pipe_fd is None:
        return
    _prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))

    def watch() -> None:
        with contextlib.suppress(OSError):
            while os.read(parent_pipe_fd, 1):
                pass
        os._exit(EXIT_LAUNCHER_GONE)

    threading.Thread(target=watch, name="launcher-watch", daemon=True).start()


def raise_fd_limit() -> None:
    """Lifts the open-files limit to the hard limit: idle connections must not starve the rest."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def set_up_logging(process: str) -> None:
    """One line per event on stderr, which the launcher sends to the process's log file. Raises
    ConfigError when PIPEMAX_LOG_LEVEL is not a level."""
    level = os.environ.get("PIPEMAX_LOG_LEVEL", "INFO")
    if level not in _LOG_LEVELS:
        raise ConfigError(f"PIPEMAX_LOG_LEVEL={level!r}; take one of {', '.join(_LOG_LEVELS)}")
    logging.basicConfig(
        level=level,
        format=f"%(asctime)s.%(msecs)03d {process} %(levelname)s %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
        force=True,
    )


def on_stop_signals(handler: Callable[[], None]) -> None:
    """Calls `handler` on SIGTERM. SIGINT is the launcher's business and is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: handler())


def _prctl(option: int, argument: object) -> None:
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(option, argument, 0, 0, 0)
