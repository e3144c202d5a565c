"""What `pipemax jobs` and `pipemax cancel` ask of a system."""

from collections.abc import Callable, Sequence

from pipemax.client import JobInfo
from pipemax.coordinator.journal_file import journal_path
from pipemax.coordinator.journal_reader import JournalReader
from pipemax.proto.errors import ConfigError, RequestError
from pipemax.proto.rundir import launcher_pid, run_dir_of
from pipemax.services.where import Where

_USERS_FAULT = ("unknown_job", "unfinished")


def all_jobs(system: Where, tell: Callable[[str], None]) -> Sequence[JobInfo]:
    """Oldest first; of a system that does not run, what its journal holds. Raises NotRunningError
    when there is neither."""
    path = None if system.is_elsewhere else journal_path(system.name)
    if path is not None and launcher_pid(run_dir_of(system.name)) is None and path.exists():
        tell(f"{system} is not running; unfinished jobs go on when it is started again")
        with JournalReader(path) as reader:
            return reader.jobs()
    with system.jobs("jobs") as jobs:
        return jobs.all()


def cancel_job(system: Where, job: str) -> JobInfo:
    """Raises ConfigError when there is no such job."""
    with system.jobs("cancel") as jobs:
        try:
            return jobs.cancel(job)
        except RequestError as error:
            raise _for_the_user(error) from error


def delete_job(system: Where, job: str) -> None:
    """Raises ConfigError when there is no such job, or it is not finished."""
    with system.jobs("delete") as jobs:
        try:
            jobs.info(job)
            jobs.delete(job)
        except RequestError as error:
            raise _for_the_user(error) from error


def _for_the_user(error: RequestError) -> Exception:
    return ConfigError(str(error)) if error.code in _USERS_FAULT else error
