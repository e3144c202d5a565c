"""What `pipemax jobs` and `pipemax cancel` ask of a system."""

from collections.abc import Callable, Sequence

from pipemax.client import JobInfo, Jobs
from pipemax.coordinator.journal_file import journal_path
from pipemax.coordinator.journal_reader import JournalReader
from pipemax.proto.errors import ConfigError, RequestError
from pipemax.proto.rundir import launcher_pid, run_dir_of

_USERS_FAULT = ("unknown_job", "unfinished")


def all_jobs(system: str, tell: Callable[[str], None]) -> Sequence[JobInfo]:
    """Oldest first; of a system that does not run, what its journal holds. Raises NotRunningError
    when there is neither."""
    path = journal_path(system)
    if launcher_pid(run_dir_of(system)) is None and path.exists():
        tell(f"{system} is not running; unfinished jobs go on when it is started again")
        with JournalReader(path) as reader:
            return reader.jobs()
    with Jobs(system) as jobs:
        return jobs.all()


def cancel_job(system: str, job: str) -> JobInfo:
    """Raises ConfigError when there is no such job."""
    with Jobs(system) as jobs:
        try:
            return jobs.cancel(job)
        except RequestError as error:
            raise _for_the_user(error) from error


def delete_job(system: str, job: str) -> None:
    """Raises ConfigError when there is no such job, or it is not finished."""
    with Jobs(system) as jobs:
        try:
            jobs.info(job)
            jobs.delete(job)
        except RequestError as error:
            raise _for_the_user(error) from error


def _for_the_user(error: RequestError) -> Exception:
    return ConfigError(str(error)) if error.code in _USERS_FAULT else error
