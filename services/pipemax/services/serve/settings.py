"""What `pipemax serve` is told at its start, checked."""

import ipaddress
from dataclasses import dataclass

from pipemax.proto.errors import ConfigError
from pipemax.services.serve.keys import NO_KEYS, ApiKeys

MIB = 2**20
LARGEST_BODY_BYTES = 15 * MIB
"""With what the protocol adds, the request in it must fit in a message."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeSettings:
    host: str = "127.0.0.1"
    port: int = 8000
    """0 takes a free one."""
    keys: ApiKeys = NO_KEYS
    insecure: bool = False
    """Without keys, also other machines are served."""
    max_body_bytes: int = 4 * MIB
    """Of a request that is no upload: all bodies being read are held in memory."""
    max_file_bytes: int = 1024 * MIB
    max_concurrent_requests: int = 1000
    """Requests being answered, streams and uploads among them; more get status 429."""
    body_timeout_s: float = 60.0
    """A request of whose body nothing comes for so long is given up."""

    def check(self) -> None:
        """Raises ConfigError for settings that cannot work or should not."""
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"--port {self.port}: give a port from 0 (any) to 65535")
        if not 1024 <= self.max_body_bytes <= LARGEST_BODY_BYTES:
            raise ConfigError(
                f"--max-body-size {self.max_body_bytes}: give 1KiB to "
                f"{LARGEST_BODY_BYTES // MIB}MiB, which is what the system takes in one request"
            )
        if self.max_file_bytes < 1024:
            raise ConfigError(f"--max-file-size {self.max_file_bytes}: give at least 1KiB")
        if self.max_concurrent_requests < 1:
            raise ConfigError("--max-concurrent-requests must be at least 1")
        if not (self.keys or self.insecure or is_loopback(self.host)):
            raise ConfigError(
                f"--host {self.host} without an API key would serve whoever can connect: give "
                "--api-key-file or PIPEMAX_API_KEY, or say --insecure-no-api-key"
            )


def is_loopback(host: str) -> bool:
    """A name other than localhost may be anything."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
