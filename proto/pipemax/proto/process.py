"""What every process of the system does at its start: take a name, log, leave with the launcher."""

import contextlib
import ctypes
import logging
import os
import resource
import signal
import sys
import threading
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
EXIT_LAUNCHER_GONE = 70


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
    """One line per event on stderr, which the launcher sends to the process's log file."""
    logging.basicConfig(
        level=os.environ.get("PIPEMAX_LOG_LEVEL", "INFO"),
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
