"""What the supervisor asks its shell to do."""

import signal
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StartProcess:
    """Start the named process; report ProcessExited when it leaves."""

    process: str


@dataclass(frozen=True, slots=True)
class Signal:
    """Send a signal to the named process."""

    process: str
    signum: signal.Signals


@dataclass(frozen=True, slots=True)
class SendDrain:
    """Ask the coordinator to finish what it accepted and to take nothing more."""


@dataclass(frozen=True, slots=True)
class AnnounceReady:
    """Tell the user that the system serves requests."""

    recovered: bool
    """After a process was restarted, rather than for the first time."""


@dataclass(frozen=True, slots=True)
class Announce:
    """Tell the user something, one line."""

    text: str


@dataclass(frozen=True, slots=True)
class Finish:
    """Every process left: clean up and report the outcome."""


Command = StartProcess | Signal | SendDrain | AnnounceReady | Announce | Finish
