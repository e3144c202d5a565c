"""Where a system's journal lies, and opening it: made private, checked, never made anew over
something that is there.

What it holds is `journal.py`'s.
"""

import logging
import os
import sqlite3
import stat
from pathlib import Path

from pipemax.coordinator.journal_wal import lost_frames
from pipemax.proto.errors import ConfigError
from pipemax.proto.rundir import run_dir_of

log = logging.getLogger(__name__)

JOURNAL_FILE = "journal.sqlite3"
APPLICATION_ID = 0x504D584A
"""Tells our files from other databases (`PRAGMA application_id`)."""
SCHEMA_VERSION = 2
CHECKED_BYTES = 2 * 2**30
"""A journal up to this size is read through when it is opened. What is wrong with a larger one
shows when the place is read."""
_LOCK_TIMEOUT_S = 5.0
_PAGE_BYTES = 8192
_CHECKPOINT_PAGES = 2000
"""Pages in the write-ahead log after which they are moved to the database."""

_SCHEMA = (
    # retry_of: the job whose failed requests this one runs again.
    # state: open, closed, cancelled, deleted. settings: of the system that took the job.
    """CREATE TABLE jobs (
        job INTEGER PRIMARY KEY AUTOINCREMENT,
        name TEXT UNIQUE,
        state TEXT NOT NULL,
        about BLOB NOT NULL,
        model_name TEXT NOT NULL,
        settings TEXT NOT NULL,
        created_at REAL NOT NULL,
        ended_at REAL,
        num_requests INTEGER NOT NULL DEFAULT 0,
        num_results INTEGER NOT NULL DEFAULT 0,
        num_failed INTEGER NOT NULL DEFAULT 0,
        prompt_tokens INTEGER NOT NULL DEFAULT 0,
        output_tokens INTEGER NOT NULL DEFAULT 0,
        retry_of INTEGER
    )""",
    # Requests without a result. request: the message Submit, or Refused for its own result.
    # Notes, requests and results are kept with checksums (`journal.sealed`).
    """CREATE TABLE requests (
        job INTEGER NOT NULL,
        seq INTEGER NOT NULL,
        note BLOB NOT NULL,
        request BLOB NOT NULL,
        PRIMARY KEY (job, seq)
    ) WITHOUT ROWID""",
    # result: the message Finished or Refused.
    """CREATE TABLE results (
        job INTEGER NOT NULL,
        position INTEGER NOT NULL,
        seq INTEGER NOT NULL,
        note BLOB NOT NULL,
        finished_at REAL NOT NULL,
        result BLOB NOT NULL,
        PRIMARY KEY (job, position)
    ) WITHOUT ROWID""",
    # Requests that run, or ran when a coordinator died, and how often that was.
    """CREATE TABLE started (
        job INTEGER NOT NULL,
        seq INTEGER NOT NULL,
        running INTEGER NOT NULL,
        deaths INTEGER NOT NULL DEFAULT 0,
        started_at REAL,
        PRIMARY KEY (job, seq)
    ) WITHOUT ROWID""",
    # Requests whose result is a failure, kept to be run again.
    """CREATE TABLE failed (
        job INTEGER NOT NULL,
        seq INTEGER NOT NULL,
        note BLOB NOT NULL,
        request BLOB NOT NULL,
        PRIMARY KEY (job, seq)
    ) WITHOUT ROWID""",
)

_DISAGREEING = """
    SELECT 1 FROM jobs WHERE state IN ('open', 'closed') AND (
        num_results != (SELECT COUNT(*) FROM results WHERE results.job = jobs.job)
        OR num_results != (SELECT COALESCE(MAX(position), -1) + 1 FROM results
                           WHERE results.job = jobs.job)
        OR num_requests - num_results
           != (SELECT COUNT(*) FROM requests WHERE requests.job = jobs.job))
    UNION ALL
    SELECT 1 FROM results JOIN requests USING (job, seq)
    LIMIT 1"""
"""Not empty where a request has no result and does not wait for one, or both, or two."""


def state_root() -> Path:
    """The folder of what outlives a system, by its name."""
    if explicit := os.environ.get("PIPEMAX_STATE_DIR"):
        return Path(explicit).absolute()
    if home := os.environ.get("XDG_STATE_HOME"):
        return Path(home).absolute() / "pipemax"
    return Path.home() / ".local" / "state" / "pipemax"


def journal_path(name: str) -> Path:
    """Of the system `name`, whether there is one or not. Raises ConfigError for what is no name."""
    return state_root() / run_dir_of(name).name / JOURNAL_FILE


def create(path: Path) -> sqlite3.Connection:
    """A new, empty journal in a folder made for it, if there is none. Made beside its place and
    then put there whole, so that it is never found half made. Raises ConfigError when its place is
    not ours or cannot be written."""
    made = path.with_name(path.name + ".new")
    try:
        _private_dir(path.parent.parent)
        _private_dir(path.parent)
        for left in (made, made.with_name(made.name + "-journal")):
            left.unlink(missing_ok=True)
        os.close(os.open(made, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        _fill(made)
        made.rename(path)
    except (OSError, sqlite3.Error) as error:
        raise ConfigError(
            f"cannot make the journal {path}: {getattr(error, 'strerror', None) or error}; set "
            "PIPEMAX_STATE_DIR to a writable folder"
        ) from error
    return open_existing(path)


def _fill(path: Path) -> None:
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        connection.execute(f"PRAGMA page_size = {_PAGE_BYTES}")
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")  # deleted jobs give their room back
        connection.execute("BEGIN")
        for table in _SCHEMA:
            connection.execute(table)
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        connection.execute("COMMIT")
    finally:
        connection.close()


def open_existing(path: Path) -> sqlite3.Connection:
    """Opens a journal for writing. Only one process can have it open: the lock is the kernel's and
    ends with the process.

    Raises ConfigError, and leaves the file as it is, when it belongs to others, is in use, is no
    journal of ours or is damaged. What a damaged write-ahead log has lost is passed over, with an
    error in the log, if what is left is whole.
    """
    _check_private(path)
    if lost := lost_frames(path, _PAGE_BYTES):
        _check_what_is_left(path)
        log.error(
            "%s-wal is damaged: the last %d pages that were written are lost. Requests whose "
            "results were on them run again; `pipemax submit` of the same files hands over what is "
            "missing of a job",
            path,
            lost,
        )
    connection = sqlite3.connect(path, isolation_level=None, timeout=_LOCK_TIMEOUT_S)
    try:
        connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        _check(connection, path)
        for pragma in (
            "journal_mode = WAL",
            # A killed process loses nothing; a power cut may lose the last moments, not the file.
            "synchronous = NORMAL",
            f"wal_autocheckpoint = {_CHECKPOINT_PAGES}",
            f"journal_size_limit = {4 * _CHECKPOINT_PAGES * _PAGE_BYTES}",
        ):
            connection.execute(f"PRAGMA {pragma}").fetchall()
    except BaseException as error:
        connection.close()
        if isinstance(error, sqlite3.Error):
            raise refusal(path, error) from error
        raise
    return connection


def open_read_only(path: Path) -> sqlite3.Connection:
    """For who wants to see what a journal holds while no system uses it, and will put up with
    damage. Raises ConfigError when there is no journal, it is in use, or not even its head can be
    read."""
    if not path.is_file():
        raise ConfigError(f"there is no journal {path}: no job was submitted to a system there")
    connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=1.0)
    try:
        _check_kind(connection, path)
    except BaseException as error:
        connection.close()
        if isinstance(error, sqlite3.Error):
            raise ConfigError(f"the journal {path} cannot be read: {error}") from error
        raise
    return connection


def refusal(path: Path, error: sqlite3.Error) -> ConfigError:
    """What the person who finds the journal unusable can do about it."""
    if "locked" in str(error):
        return ConfigError(
            f"the journal {path} is in use by another process; is a system of this name running "
            "with another PIPEMAX_RUNTIME_DIR? Stop it, or use another --name"
        )
    return ConfigError(
        f"the journal {path} cannot be used ({error}). Its finished results may still be readable: "
        f"`pipemax results JOB --journal {path} -o OUT`. To start without its jobs, move it away, "
        "with the files beside it that begin with its name"
    )


def _check_what_is_left(path: Path) -> None:
    """By a damaged write-ahead log. It may be a mixture of old and new pages. Raises ConfigError
    unless the tables agree with each other."""
    connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
    try:
        _check(connection, path)
        if connection.execute(_DISAGREEING).fetchone() is not None:
            raise sqlite3.DatabaseError("its write-ahead log is damaged, and its tables disagree")
    except sqlite3.Error as error:
        raise refusal(path, error) from error
    finally:
        connection.close()


def _check(connection: sqlite3.Connection, path: Path) -> None:
    _check_kind(connection, path)
    if path.stat().st_size <= CHECKED_BYTES:
        (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        if found != "ok":
            raise sqlite3.DatabaseError(" ".join(str(found).split()))


def _check_kind(connection: sqlite3.Connection, path: Path) -> None:
    (kind,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if kind != APPLICATION_ID:
        raise sqlite3.DatabaseError("it is a database of something else")
    if version != SCHEMA_VERSION:
        raise ConfigError(
            f"the journal {path} has format {version}, this version of PipeMax writes "
            f"{SCHEMA_VERSION}; use the version that wrote it, or move the file away"
        )


def _private_dir(path: Path) -> None:
    """Makes `path` with mode 0700, or checks that it is ours and private."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise ConfigError(
            f"{path} must be a folder of ours that nobody else can enter (mode 700); set "
            "PIPEMAX_STATE_DIR to one"
        )


def _check_private(path: Path) -> None:
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise ConfigError(
            f"the journal {path} must be a file of ours that nobody else can read (mode 600); "
            "prompts and results are in it. Correct that, or set PIPEMAX_STATE_DIR to another "
            "folder"
        )
