"""A journal whose bytes are not those that were written, or cannot be: what was finished stays
finished, the rest runs, and nobody is given what is wrong."""

import contextlib
import resource
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipemax.coordinator.journal_reader import JournalReader
from pipemax.coordinator.journal_wal import lost_frames
from pipemax.proto.errors import ConfigError
from pipemax.proto.messages import ingest
from support.job_world import JobWorld, entry

COUNT = 40
PAGE_BYTES = 8192
FRAME_BYTES = 24 + PAGE_BYTES


@pytest.fixture
def world(tmp_path: Path) -> Iterator[JobWorld]:
    world = JobWorld(tmp_path / "w")
    yield world
    world.close()


def fill(world: JobWorld, count: int = COUNT, size: int = 10) -> None:
    """A job `a`, closed."""
    world.call(ingest.OpenJob, job="a")
    for first in range(0, count, 10):
        requests = tuple(entry(text_of(n, size)) for n in range(first, min(count, first + 10)))
        world.call(ingest.AddRequests, job="a", first_seq=first, requests=requests)
    world.call(ingest.CloseJob, job="a", num_requests=count)


def text_of(number: int, size: int = 10) -> str:
    return f"text {number:04} ".ljust(size, "x")


def flip(path: Path, what: bytes) -> None:
    """One bit in the only place where `what` is."""
    content = bytearray(path.read_bytes())
    assert content.count(what) == 1
    content[content.index(what) + len(what) // 2] ^= 1
    path.write_bytes(content)


def wal_of(path: Path) -> Path:
    return path.with_name(path.name + "-wal")


def check_whole(world: JobWorld, but: dict[int, str] | None = None) -> None:
    """Every request has one result, which is its own; `but`: codes of those that have none."""
    results = world.results("a")
    assert Counter(result.seq for result in results) == Counter(range(COUNT))
    for result in results:
        if but and result.seq in but:
            assert isinstance(result.result, ingest.Refused)
            assert result.result.code == but[result.seq]
        else:
            assert isinstance(result.result, ingest.Finished)
            assert result.result.text == text_of(result.seq).upper()


def test_a_flipped_bit_costs_the_result_it_is_in(world: JobWorld) -> None:
    """Which would otherwise be delivered with another letter in it."""
    fill(world)
    world.run()
    world.jobs.close(clean=True)
    flip(world.path, text_of(7).upper().encode())
    with JournalReader(world.path) as reader:
        found = reader.page("a", 0)
        assert reader.unreadable == 1
    assert [r.seq for r in found if getattr(r.result, "code", "") == "damaged"] == [7]
    world.kill()
    check_whole(world, {7: "damaged"})
    (hurt,) = (result for result in world.results("a") if result.seq == 7)
    assert hurt.note == text_of(7).encode(), "it is known whose it was"


def test_a_flipped_bit_costs_the_request_it_is_in(world: JobWorld) -> None:
    fill(world)
    world.jobs.close(clean=True)
    waits = b"id-" + text_of(31).encode()
    flip(world.path, waits)
    world.kill()
    world.run()
    check_whole(world, {31: "damaged"})


def flipped(share: float) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[int(share * (len(content) - 1))] ^= 1
        path.write_bytes(content)

    return spoil


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("spoil", "is_noticed"),
    [
        (flipped(0.0), True),
        (flipped(0.3), True),
        (flipped(0.6), True),
        (cut, False),  # as a write that was cut short looks like
        (Path.unlink, False),
    ],
    ids=["header", "early", "late", "cut", "gone"],
)
def test_a_damaged_write_ahead_log_loses_no_request(
    world: JobWorld,
    caplog: pytest.LogCaptureFixture,
    spoil: Callable[[Path], None],
    is_noticed: bool,
) -> None:
    """What was closed is in the database; results behind the damage come again."""
    fill(world)
    for _ in range(8):
        world.finish_some(2)
        world.round()
    before = len(world.results("a"))
    assert before == 16
    world.die()
    assert lost_frames(world.path, PAGE_BYTES) == 0
    assert wal_of(world.path).stat().st_size > 8 * FRAME_BYTES
    spoil(wal_of(world.path))
    world.live_again()
    assert ("-wal is damaged: the last" in caplog.text) == is_noticed
    assert len(world.results("a")) < before
    world.run()
    check_whole(world)


def test_what_is_left_of_a_damaged_log_must_agree(world: JobWorld) -> None:
    """Or the journal is left as it is, for `results` to read what there is."""
    fill(world)
    world.run()
    log = wal_of(world.path).read_bytes()
    world.jobs.close(clean=True)
    with sqlite3.connect(world.path) as database:
        database.execute("DELETE FROM results WHERE position = 5")
    database.close()
    wal_of(world.path).write_bytes(bytes([log[0] ^ 1]) + log[1:])
    before = {path: path.read_bytes() for path in (world.path, wal_of(world.path))}
    with pytest.raises(ConfigError, match=r"log is damaged, and its tables disagree.*results JOB"):
        world.jobs.open()
    assert {path: path.read_bytes() for path in before} == before


def test_a_write_that_was_cut_short_is_no_damage(world: JobWorld) -> None:
    fill(world)
    world.run()
    world.die()
    log = wal_of(world.path)
    whole = log.read_bytes()
    for missing in (1, PAGE_BYTES, FRAME_BYTES - 1):
        log.write_bytes(whole[:-missing])
        assert lost_frames(world.path, PAGE_BYTES) == 0
    log.write_bytes(whole[:-PAGE_BYTES] + bytes(PAGE_BYTES))  # the file has grown, and no more
    assert lost_frames(world.path, PAGE_BYTES) == 0
    world.live_again()
    world.run()
    check_whole(world)


def test_damage_under_a_running_coordinator_ends_it_with_what_to_do(world: JobWorld) -> None:
    fill(world, count=400, size=8000)
    world.run()
    journal = world.jobs._journal
    assert journal is not None
    journal.sync()
    size = world.path.stat().st_size
    with world.path.open("r+b") as file:
        file.seek(size // 4)
        file.write(b"\xa5" * (size // 2))
    journal._db.execute("PRAGMA shrink_memory")
    world.call(ingest.OpenJob, job="b")  # begins the log anew: pages come from the database
    journal._db.execute("PRAGMA shrink_memory")
    with pytest.raises(ConfigError, match=r"cannot be used .* move it away"):
        world.results("a")


@contextlib.contextmanager
def no_room() -> Iterator[None]:
    """No file can grow."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_no_room_for_the_journal(
    world: JobWorld, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused by the file system itself, in the middle of a transaction."""
    monkeypatch.setattr("pipemax.coordinator.jobs._RETRY_S", 0.0)
    fill(world)
    world.finish_some(3)
    with no_room():
        world.round()
        answer = world.call(ingest.OpenJob, job="b")
        assert isinstance(answer, ingest.JobRefused)
        assert answer.code == "journal"
        assert "make room" in answer.message
        assert world.call(ingest.ListJobs, job="a").jobs[0].num_results == 0
    assert "cannot be written" in caplog.text
    world.kill()
    world.run()
    check_whole(world)
