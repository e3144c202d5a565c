"""The exceptions PipeMax raises on purpose.

::

    PipemaxError                what is wrong, with which value, what to do: one line
    ├── ConfigError             a flag or setting that cannot work
    ├── ModelError              a model folder that cannot be served
    │   └── UnsupportedModelError   an architecture PipeMax refuses by name
    ├── RequestError            one request is refused; the others go on
    ├── WireError               a message that does not follow the protocol
    ├── PipemaxSystemError      the running system failed or cannot be reached
    │   ├── AlreadyRunningError     a second `up` with the same name
    │   ├── NotRunningError         nothing answers under that name
    │   └── ProcessFailedError      a process did not start or gave up
    └── InvariantError          a bug in PipeMax: state contradicts itself
"""


class PipemaxError(Exception):
    """Base of all errors that a user may see as one line."""


class ConfigError(PipemaxError):
    """A flag or setting that cannot work; the message names it and says what would."""


class ModelError(PipemaxError):
    """The model folder is missing something or holds something unreadable."""


class UnsupportedModelError(ModelError):
    """The architecture is not one PipeMax was shown to run correctly."""


class RequestError(PipemaxError):
    """One request is refused. `code` is short and stable, for programs."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class WireError(PipemaxError):
    """A message that does not follow the protocol. `code` is short and stable."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class PipemaxSystemError(PipemaxError):
    """The running system failed or cannot be reached."""


class AlreadyRunningError(PipemaxSystemError):
    """Another launcher holds the run directory's lock."""


class NotRunningError(PipemaxSystemError):
    """No system answers under that name."""


class ProcessFailedError(PipemaxSystemError):
    """A process did not become ready in time, or failed more often than allowed."""


class InvariantError(PipemaxError):
    """A bug in PipeMax: its own state contradicts itself."""
