"""Pages of the host pool: touched part by part, on the CPUs asked for, and told of."""

import os
import select
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipemax.kv_daemon import numa
from pipemax.kv_daemon.host_pool import HostPool
from pipemax.kv_daemon.pages import PoolPages
from pipemax.proto.errors import ConfigError

SIZE = 3 * 64 * 2**20 + 4096 + 1
PARTS = ((0, 100_000), (100_000, SIZE))
LARGEST_PAGE = 2**21
"""That memory may come in, where the machine allows huge pages for shared memory."""


@pytest.fixture
def wake_fd() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_CLOEXEC)
    yield fd
    os.close(fd)


@pytest.fixture
def pool() -> Iterator[HostPool]:
    pool = HostPool(SIZE)
    yield pool
    pool.close()


def resident_bytes(pool: HostPool) -> int:
    assert pool.handle is not None
    return os.fstat(pool.handle.fd).st_blocks * 512


def wait(wake_fd: int, until: Callable[[], bool]) -> None:
    while not until():
        assert select.select([wake_fd], [], [], 30)[0]
        os.eventfd_read(wake_fd)


def test_every_page_is_touched_part_by_part(pool: HostPool, wake_fd: int) -> None:
    finished = []
    pages = PoolPages(pool, PARTS, wake_fd, lambda begin, end: finished.append((begin, end)))
    pages.touch(0)
    pages.touch(0)
    wait(wake_fd, lambda: pages.is_there(0))
    assert 100_000 <= resident_bytes(pool) <= LARGEST_PAGE
    assert not pages.is_there(1)
    assert not pages.all_there
    pages.touch(1)
    wait(wake_fd, lambda: pages.all_there)
    assert resident_bytes(pool) >= SIZE
    assert tuple(finished) == PARTS
    pages.close()


def test_what_goes_wrong_is_raised(pool: HostPool, wake_fd: int) -> None:
    def fail(begin: int, end: int) -> None:
        raise ValueError("no room")

    pages = PoolPages(pool, ((0, 1),), wake_fd, fail)
    pages.touch(0)
    os.eventfd_read(wake_fd)
    with pytest.raises(ValueError, match="no room"):
        _ = pages.all_there
    pages.close()


def test_a_stop_is_heard_between_portions(pool: HostPool, wake_fd: int) -> None:
    pages = PoolPages(pool, ((0, SIZE),), wake_fd)
    pool.stop_touching()
    pages.touch(0)
    pages.close()
    assert resident_bytes(pool) <= LARGEST_PAGE  # its first page, at most


def test_pages_are_touched_on_the_cpus_asked_for(
    pool: HostPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpus = frozenset([min(os.sched_getaffinity(0)), 10**6])
    bound = []
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, on: bound.append((pid, on)))
    assert pool.touch(0, SIZE, cpus)
    assert bound
    assert set(bound) == {(0, cpus - {10**6})}
    bound.clear()
    assert pool.touch(0, 1)
    assert pool.touch(0, 1, frozenset([10**6]))  # no CPU that this process may use
    assert not bound


def test_without_host_memory_there_is_nothing_to_touch(wake_fd: int) -> None:
    pool = HostPool(0)
    assert pool.handle is None
    pages = PoolPages(pool, ((0, 0),), wake_fd)
    pages.touch(0)
    wait(wake_fd, lambda: pages.all_there)
    assert [region.shape for region in pool.regions(0, (96, 64))] == [(0, 96), (0, 64)]
    pages.close()
    pool.close()


def test_a_daemon_waits_for_what_its_predecessor_held(monkeypatch: pytest.MonkeyPatch) -> None:
    available = iter([0, 0, 2**20])
    monkeypatch.setattr(
        "pipemax.kv_daemon.host_pool.available_memory_bytes", lambda: next(available)
    )
    HostPool(4096, patience_s=60).close()
    with pytest.raises(StopIteration):
        next(available)
    available = iter([0])
    with pytest.raises(ConfigError, match="is more than"):  # and is not looked at twice
        HostPool(2**60, patience_s=60)


def machine(sysfs: Path, nodes: dict[int, str], devices: dict[str, str]) -> Path:
    for node, cpus in nodes.items():
        folder = sysfs / f"devices/system/node/node{node}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(cpus + "\n")
    for device, node in devices.items():
        folder = sysfs / "bus/pci/devices" / device
        folder.mkdir(parents=True)
        (folder / "numa_node").write_text(node + "\n")
    return sysfs


def test_which_cpus_are_near_a_gpu(tmp_path: Path) -> None:
    devices = {"0000:65:00.0": "1", "0000:17:00.0": "-1", "0001:65:00.0": "2", "0000:b3:00.0": "7"}
    sysfs = machine(tmp_path, {0: "0-3,8-9", 1: "4-7,10", 2: ""}, devices)
    assert numa.num_nodes(sysfs) == 3
    for name in ("0000:65:00.0", "00000000:65:00.0", "0000:65:00.0".upper()):
        assert numa.cpus_near(name, sysfs) == {4, 5, 6, 7, 10}
    assert numa.cpus_near("0000:17:00.0", sysfs) is None  # the firmware does not say
    assert numa.cpus_near("0001:65:00.0", sysfs) is None  # a node without CPUs
    assert numa.cpus_near("0000:b3:00.0", sysfs) is None  # a node that is not there
    assert numa.cpus_near("0000:01:00.0", sysfs) is None
    assert numa.num_nodes(tmp_path / "none") == 1


def test_lists_of_cpus() -> None:
    assert numa.parse_cpu_list("0-2,5,7-7\n") == {0, 1, 2, 5, 7}
    assert numa.parse_cpu_list("\n") == frozenset()
    with pytest.raises(ValueError, match="x"):
        numa.parse_cpu_list("0,x")


def test_binding_holds_for_the_calling_thread_only() -> None:
    before = os.sched_getaffinity(0)
    one = frozenset([min(before)])
    seen = []

    def bind() -> None:
        numa.run_on(one)
        seen.append(os.sched_getaffinity(0))

    thread = threading.Thread(target=bind)
    thread.start()
    thread.join()
    assert seen == [one]
    assert os.sched_getaffinity(0) == before
