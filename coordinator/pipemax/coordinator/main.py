"""Entry of the coordinator process."""

import logging
from pathlib import Path

from pipemax.coordinator.garbage import Garbage
from pipemax.coordinator.http_server import HttpServer
from pipemax.coordinator.shell import CoordinatorShell
from pipemax.coordinator.text.processor import TextProcessor
from pipemax.coordinator.web import resources
from pipemax.proto.config import load_config
from pipemax.proto.errors import ConfigError
from pipemax.proto.process import on_stop_signals
from pipemax.proto.rundir import METRICS_PORT_FILE

log = logging.getLogger(__name__)


def body(run_dir: Path, index: int) -> None:
    """Serve the system whose configuration lies in `run_dir` until SIGTERM."""
    config = load_config(run_dir)
    text = TextProcessor(Path(config.model))
    shell = CoordinatorShell(config, run_dir, text)
    on_stop_signals(shell.stop)
    try:
        server = HttpServer(
            config.metrics_host,
            config.metrics_port,
            resources(shell.metrics.registry, shell.latest_status, shell.live_spans),
        )
    except OSError as error:
        raise ConfigError(
            f"cannot serve /metrics on {config.metrics_host}:{config.metrics_port}: {error}; "
            "choose another --metrics-port"
        ) from error
    Garbage.take_over()  # collections would take a step's time, and full ones that of several
    (run_dir / METRICS_PORT_FILE).write_text(f"{server.port}\n")
    try:
        shell.run()
    finally:
        server.close()
