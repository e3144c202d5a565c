"""What the daemon does for stages on GPUs beside copying: regions, stray answers, own memory."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipemax.kv_daemon.context_memory import context_bytes, parse
from pipemax.kv_daemon.cuda_link import is_running
from pipemax.kv_daemon.engine import HostLayout
from pipemax.kv_daemon.events import Run, StartCopy
from pipemax.kv_daemon.host_pool import HostPool
from pipemax.kv_daemon.order_engine import OrderEngine
from pipemax.kv_daemon.pages import PoolPages
from pipemax.kv_daemon.regions import RegionDesk
from pipemax.proto.messages.kv import AskHostRegion, AttachPool, CopyEnded
from pipemax.proto.messages.types import pack_i32

LAYOUT = HostLayout(4, (4096, 8192))


@pytest.fixture
def pool() -> Iterator[HostPool]:
    pool = HostPool(4 * (4096 + 8192))
    yield pool
    pool.close()


@pytest.fixture
def engine(pool: HostPool) -> Iterator[OrderEngine]:
    engine = OrderEngine(LAYOUT, pool.handle)
    yield engine
    engine.close()
    engine.close()


def ended(number: int) -> CopyEnded:
    return CopyEnded(number=number, direction="load", bytes=10, copies=1, busy_s=0.5)


def attach(stage: int, incarnation: str) -> AttachPool:
    return AttachPool(epoch=1, stage=stage, incarnation=incarnation, num_blocks=9, block_bytes=4096)


def test_orders_say_what_to_copy_and_behind_what(engine: OrderEngine) -> None:
    order = engine.start(StartCopy(1, "load", (Run(3, 5, 1), Run(0, 7, 2)), number=6, after=40))
    assert (order.number, order.direction, order.after) == (6, "load", 40)
    assert order.runs == pack_i32([3, 5, 1, 0, 7, 2])


def test_an_end_is_of_all_before_it_and_of_nothing_that_was_not_ordered(
    engine: OrderEngine,
) -> None:
    for number in (4, 5, 6):
        engine.start(StartCopy(1, "load", (Run(0, 0, 1),), number=number))
    for stray in (3, 7):
        engine.copy_ended(1, ended(stray))
    engine.copy_ended(0, ended(5))
    assert engine.completed() == []
    engine.copy_ended(1, ended(5))
    assert engine.completed() == [(1, "load")] * 2
    engine.copy_ended(1, ended(5))
    engine.copy_ended(1, ended(6))
    assert engine.completed() == [(1, "load")]
    totals = engine.totals()[1]
    assert (totals.load_bytes, totals.load_seconds, totals.load_copies) == (20, 1.0, 2)


def test_copies_end_with_the_process_that_made_them(engine: OrderEngine) -> None:
    engine.map_pool(attach(1, "a"))
    engine.start(StartCopy(1, "load", (Run(0, 0, 1),), number=0))
    engine.start(StartCopy(1, "store", (Run(1, 1, 1),), number=0))
    engine.map_pool(attach(1, "a"))
    assert engine.completed() == []
    engine.map_pool(attach(0, "b"))
    assert engine.completed() == []
    engine.map_pool(attach(1, "c"))
    assert sorted(engine.completed()) == [(1, "load"), (1, "store")]


def test_without_a_host_pool_there_is_no_region() -> None:
    engine = OrderEngine(HostLayout(0, (4096, 8192)), None)
    assert engine.region(0) is None
    assert engine.map_pool(attach(0, "a")).region is None
    engine.close()


def test_regions_are_touched_near_the_gpu_that_asks(pool: HostPool, engine: OrderEngine) -> None:
    """Where the machine has several memory nodes, nothing is touched before."""
    wake_fd = os.eventfd(0)
    near = {"a": frozenset([1]), "b": None}
    asked: list[tuple[int, frozenset[int] | None]] = []

    class Pages(PoolPages):
        def touch(self, part: int, cpus: frozenset[int] | None = None) -> None:
            asked.append((part, cpus))
            super().touch(part, None)

    pages = Pages(pool, tuple(map(LAYOUT.part, (0, 1))), wake_fd)
    desk = RegionDesk(pages, engine, near.__getitem__)
    desk.begin(2)
    assert asked == []
    desk.ask(AskHostRegion(stage=1, pci_bus_id="a"))
    desk.ask(AskHostRegion(stage=1, pci_bus_id="a"))
    answers = []
    while not answers:
        os.eventfd_read(wake_fd)
        answers = desk.answers()
    assert [(stage, answer.region) for stage, answer in answers] == [(1, engine.region(1))]
    assert desk.answers() == []
    desk.ask(AskHostRegion(stage=0, pci_bus_id="b"))
    assert asked == [(1, frozenset([1]))] * 2 + [(0, None)]
    pages.close()
    asked.clear()
    RegionDesk(pages, engine, near.__getitem__).begin(2, ("b", "a"))
    assert asked == [(0, None), (1, frozenset([1]))]
    asked.clear()
    RegionDesk(pages, engine, None).begin(2)
    assert asked == [(0, None), (1, None)]
    os.close(wake_fd)


def test_regions_lie_one_behind_the_other() -> None:
    assert [LAYOUT.part(stage) for stage in (0, 1)] == [(0, 16384), (16384, 49152)]


def test_a_process_that_has_ended_runs_no_more() -> None:
    assert is_running(os.getpid())
    with subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"],
                          stdin=subprocess.PIPE) as child:  # fmt: skip
        assert is_running(child.pid)
        child.kill()
        give_up_s = time.monotonic() + 20
        while is_running(child.pid):  # not reaped: a zombie
            assert time.monotonic() < give_up_s
            time.sleep(0.01)
    assert not is_running(child.pid)


def test_the_contexts_share_of_a_gpu() -> None:
    output = "00000000:65:00.0, 7, 412\n0000:B3:00.0, 7, 398\n00000000:65:00.0, 8, 20000\nno, 7\n"
    output += "00000000:17:00.0, 7, [N/A]\n"
    mib = 2**20
    assert parse(output, 7) == {"0000:65:00.0": 412 * mib, "0000:b3:00.0": 398 * mib}


def test_the_tool_is_asked(tmp_path: Path) -> None:
    line = f"00000000:65:00.0, {os.getpid()}, 412"
    known = "0000:65:00.0"
    assert context_bytes((known, known), ("echo", line)) == (412 * 2**20,) * 2
    assert context_bytes((known, "0000:66:00.0"), ("echo", line)) == ()
    assert context_bytes((known,), (str(tmp_path / "none"),)) == ()
