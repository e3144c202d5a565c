"""Which system a command talks to: one of this machine, by its name, or one elsewhere."""

from dataclasses import dataclass
from pathlib import Path

from pipemax.client import Client, Jobs


@dataclass(frozen=True, slots=True)
class Where:
    name: str = "default"
    """Of a system of this machine; without meaning where there is an endpoint."""
    endpoint: str | None = None
    """Of one elsewhere."""
    keys: Path | None = None

    @property
    def is_elsewhere(self) -> bool:
        """There is no run directory, journal or launcher of it here."""
        return self.endpoint is not None

    def __str__(self) -> str:
        return self.endpoint or self.name

    def client(self, label: str) -> Client:
        """Connects. Raises as `Client`."""
        return Client(self.name, endpoint=self.endpoint, keys=self.keys, label=label)

    def jobs(self, label: str) -> Jobs:
        """Connects. Raises as `Jobs`."""
        return Jobs(self.name, endpoint=self.endpoint, keys=self.keys, label=label)
