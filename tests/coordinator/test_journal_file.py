"""The journal as a file: private, one process's, checked, and never made anew over another."""

import os
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from pipemax.coordinator import journal_file
from pipemax.coordinator.journal import Journal, Outcome
from pipemax.coordinator.journal_reader import JournalReader
from pipemax.proto.errors import ConfigError
from pipemax.proto.messages.ingest import JobResult, Refused
from pipemax.proto.wire import encode


def make(path: Path, count: int = 0, size: int = 100) -> Path:
    """A journal with a finished job `a` of `count` results."""
    journal = Journal(path)
    with journal.transaction():
        row = journal.open_job("a", b"", "m", "s", 1.0)
        journal.add("a", 0, [(b"note", b"request")] * count)
        journal.close_job("a", count, 1.0)
    with journal.transaction():
        refused = Refused(request_id="x", code="c", message="m" * size)
        journal.finish((Outcome(row.job, n, encode(refused), True) for n in range(count)), 2.0)
    journal.close(clean=True)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "name" / "journal.sqlite3"


def test_where_it_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert journal_file.journal_path("x") == Path(
        os.environ["PIPEMAX_STATE_DIR"], "x", "journal.sqlite3"
    )
    monkeypatch.delenv("PIPEMAX_STATE_DIR")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert journal_file.state_root() == tmp_path / "pipemax"
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert journal_file.state_root() == tmp_path / ".local" / "state" / "pipemax"
    with pytest.raises(ConfigError, match="--name"):
        journal_file.journal_path("../x")


def test_nobody_else_can_read_it(path: Path) -> None:
    journal = Journal(path)
    try:
        assert path.parent.stat().st_mode & 0o777 == 0o700
        assert path.parent.parent.stat().st_mode & 0o777 == 0o700
        with journal.transaction():
            journal.open_job("a", b"", "m", "s", 1.0)
        modes = {entry.name: entry.stat().st_mode & 0o777 for entry in path.parent.iterdir()}
        assert modes == {"journal.sqlite3": 0o600, "journal.sqlite3-wal": 0o600}
    finally:
        journal.close(clean=True)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.chmod(0o640),
        lambda path: path.parent.chmod(0o750) or path.unlink(),
        lambda path: path.rename(path.with_name("x")) and path.symlink_to("x"),
    ],
    ids=["file", "folder", "link"],
)
def test_what_others_could_read_is_refused(path: Path, spoil: Callable[[Path], None]) -> None:
    make(path)
    spoil(path)
    with pytest.raises(ConfigError, match="nobody else can"):
        Journal(path)


def other_database(path: Path) -> None:
    path.unlink()
    os.close(os.open(path, os.O_CREAT, 0o600))
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE x (y)")
    connection.close()


def newer_format(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def scribble(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size * 3 // 4)
        file.write(b"\xa5" * 8192)


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (other_database, "database of something else"),
        (newer_format, "has format 99, this version of PipeMax writes 2"),
        (lambda path: path.write_bytes(b"no database" * 100), "not a database"),
        (lambda path: os.truncate(path, 0), "database of something else"),
        (cut, "journal .* cannot be used"),
        (scribble, "journal .* cannot be used"),
    ],
)
def test_a_file_that_is_no_sound_journal_is_refused_and_kept(
    path: Path, spoil: Callable[[Path], None], why: str
) -> None:
    make(path, count=2000)
    spoil(path)
    before = path.read_bytes()
    for _ in range(2):
        with pytest.raises(ConfigError, match=why) as caught:
            Journal(path)
    assert "move" in str(caught.value)
    assert path.read_bytes() == before


def all_results(reader: JournalReader) -> list[JobResult]:
    found: list[JobResult] = []
    while page := reader.page("a", len(found)):
        found += page
    return found


def test_what_damage_spares_can_be_read(path: Path) -> None:
    make(path, count=2000)
    scribble(path)
    with JournalReader(path) as reader:
        (job,) = reader.jobs()
        assert (job.name, job.num_results) == ("a", 2000)
        found = all_results(reader)
        codes = Counter(getattr(result.result, "code", "") for result in found)
        assert codes == {"c": 2000 - reader.unreadable, "damaged": reader.unreadable}
        assert 0 < reader.unreadable < 200
        with pytest.raises(ConfigError, match="no job 'b'"):
            reader.page("b", 0)


def test_reading_a_sound_one_changes_nothing(path: Path) -> None:
    make(path, count=600)
    before = path.read_bytes()
    with JournalReader(path) as reader:
        assert [result.seq for result in all_results(reader)] == list(range(600))
        assert reader.unreadable == 0
    assert path.read_bytes() == before
    with pytest.raises(ConfigError, match="there is no journal"):
        JournalReader(path.with_name("other"))


def test_two_processes_cannot_use_one(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_file, "_LOCK_TIMEOUT_S", 0.1)
    make(path)
    code = (
        "import sys, pathlib; from pipemax.coordinator.journal import Journal; "
        "journal = Journal(pathlib.Path(sys.argv[1])); print('open', flush=True); input()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == b"open\n"
        with pytest.raises(ConfigError, match="in use by another process"):
            Journal(path)
        with pytest.raises(ConfigError, match="locked"):
            JournalReader(path)
    finally:
        other.kill()
        other.communicate()
    Journal(path).close(clean=True)


def test_a_creation_that_was_cut_short_is_begun_again(path: Path) -> None:
    path.parent.mkdir(mode=0o700, parents=True)
    path.parent.parent.chmod(0o700)
    path.with_name("journal.sqlite3.new").write_bytes(b"half a file")
    make(path, count=1)
    assert [entry.name for entry in path.parent.iterdir()] == ["journal.sqlite3"]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="PIPEMAX_STATE_DIR to a writable folder"):
        Journal(tmp_path / "file" / "name" / "journal.sqlite3")
