"""Runs the server until it is told to stop."""

import logging
import re
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import uvicorn

from pipemax.coordinator.journal_file import journal_path, state_root
from pipemax.proto.errors import ConfigError
from pipemax.proto.process import raise_fd_limit, set_process_name
from pipemax.services.foreground import handlers
from pipemax.services.serve.app import System, make_app
from pipemax.services.serve.settings import ServeSettings, is_loopback
from pipemax.services.where import Where

_GRACE_S = 30
"""Answers that are under way at a stop have so long to end."""
_KEEP_ALIVE_S = 30
_MAX_HEADER_BYTES = 32 * 1024


def serve(where: Where, settings: ServeSettings, tell: Callable[[str], None]) -> None:
    """Serves until SIGINT or SIGTERM. Raises ConfigError when it cannot listen, or another server
    serves that system."""
    settings.check()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    set_process_name("pm-serve")
    raise_fd_limit()
    system = System(
        lambda: where.client("serve"), lambda: where.jobs("serve"), folder_of(where) / "serve"
    )
    app = make_app(system, settings)
    listener = _listen(settings)
    port = listener.getsockname()[1]
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    tell(f"serving {where} at http://{host}:{port}/v1")
    if not settings.keys:
        who = "every user of this machine" if is_loopback(settings.host) else "whoever can connect"
        tell(f"no API key is set: {who} may use it")
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws="none",
        lifespan="on",
        h11_max_incomplete_event_size=_MAX_HEADER_BYTES,
        http="h11",
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=_GRACE_S,
    )
    # uvicorn stops at a signal, and then sends it once more to whoever handled it before.
    stopped: dict[signal.Signals, Callable[[], None]] = {
        signum: lambda: None for signum in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        with handlers(stopped):
            uvicorn.Server(config).run(sockets=[listener])
    finally:
        listener.close()
    tell("stopped")


def folder_of(where: Where) -> Path:
    """Where this machine keeps what belongs to the system, beside its journal if it is here."""
    if where.endpoint is None:
        return journal_path(where.name).parent
    return state_root() / ("at-" + re.sub(r"[^A-Za-z0-9.]+", "-", where.endpoint))


def _listen(settings: ServeSettings) -> socket.socket:
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, proto)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(1024)
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {settings.host} port {settings.port}: {error}; choose another "
            "--port or --host"
        ) from error
    return listener
