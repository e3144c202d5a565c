"""What happens to a running system, as the supervisor sees it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Begin:
    """Start the system."""


@dataclass(frozen=True, slots=True)
class ProcessExited:
    """A process was reaped."""

    process: str
    status: int
    """As in `subprocess`: negative is the signal that ended it."""
    reason: str | None = None
    """What it said last: the line of its error file, else of its log."""


@dataclass(frozen=True, slots=True)
class Unresponsive:
    """A process lives and says nothing any more."""

    process: str
    silent_s: float


@dataclass(frozen=True, slots=True)
class StartFailed:
    """The kernel refused to start a process."""

    process: str
    reason: str


@dataclass(frozen=True, slots=True)
class SystemReady:
    """The coordinator serves requests: after the first start or after a recovery."""


@dataclass(frozen=True, slots=True)
class MissingReported:
    """The coordinator said which processes it waits for."""

    processes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StopRequested:
    """Someone wants the system to end. A second request does not wait for anything."""

    drain: bool


@dataclass(frozen=True, slots=True)
class Drained:
    """The coordinator has nothing left to do."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed."""


Event = (
    Begin
    | ProcessExited
    | Unresponsive
    | StartFailed
    | SystemReady
    | MissingReported
    | StopRequested
    | Drained
    | Tick
)
