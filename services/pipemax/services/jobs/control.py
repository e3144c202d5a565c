"""What `pipemax jobs` and `pipemax cancel` ask of a system."""

import itertools
import re
from collections.abc import Callable, Iterator, Sequence

from pipemax.client import JobInfo
from pipemax.coordinator.journal_file import journal_path
from pipemax.coordinator.journal_reader import JournalReader
from pipemax.proto.errors import ConfigError, RequestError
from pipemax.proto.rundir import launcher_pid, run_dir_of
from pipemax.services.where import Where

_USERS_FAULT = ("unknown_job", "unfinished", "nothing_failed")
_UNITS_S = {"d": 86400, "h": 3600, "min": 60, "s": 1}
_MOST_CHARS = 128
"""Of a job's name."""


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


def delete_old_jobs(system: Where, age: str, now: float) -> list[str]:
    """Forgets jobs that ended longer ago than `age`, such as 7d, 12h or 30min; `now` is Unix time.
    Returns their names. Raises ConfigError for what is no age."""
    match = re.fullmatch(r"(\d{1,9})(d|h|min|s)", age)
    if match is None:
        raise ConfigError(
            f"--delete-older-than {age:.40}: write an age such as 7d, 12h, 30min or 0s"
        )
    before = now - int(match[1]) * _UNITS_S[match[2]]
    with system.jobs("delete") as jobs:
        names = [
            job.name
            for job in jobs.all()
            if job.state in ("finished", "cancelled") and (job.ended_at or job.created_at) <= before
        ]
        for name in names:
            jobs.delete(name)
    return names


def retry_job(system: Where, job: str) -> JobInfo:
    """Runs the failed requests of a job, finished or cancelled, again as another one, which it
    returns. Interrupted, done again it goes on. Raises ConfigError when there is no such job, it is
    not finished or nothing failed."""
    with system.jobs("retry") as jobs:
        try:
            states = {info.name: info.state for info in jobs.all()}
            for name in _retry_names(job):
                if states.get(name, "open") != "open":
                    continue
                try:
                    return jobs.retry(job, name)
                except RequestError as error:
                    if error.code != "other_job":
                        raise
        except RequestError as error:
            raise _for_the_user(error) from error
    raise AssertionError("names do not end")


def _retry_names(job: str) -> Iterator[str]:
    """`night.retry-1`, `night.retry-2`, …: of what is a retry already, too."""
    stem = re.sub(r"\.retry-\d+\Z", "", job)
    for number in itertools.count(1):
        end = f".retry-{number}"
        yield stem[: _MOST_CHARS - len(end)] + end


def _for_the_user(error: RequestError) -> Exception:
    return ConfigError(str(error)) if error.code in _USERS_FAULT else error
