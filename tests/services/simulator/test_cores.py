"""Stages that share cores."""

import pytest

from pipemax.services.simulator.cores import SharedCores
from pipemax.services.simulator.engine import EventLoop


def test_work_is_slower_while_there_is_more_of_it() -> None:
    loop = EventLoop()
    cores = SharedCores(loop, [1.0, 2.0, 4.0])
    ended: dict[str, int] = {}

    def start(name: str, work_ns: int) -> None:
        cores.after(work_ns, lambda: ended.setdefault(name, loop.now_ns))

    start("a", 100)
    loop.at(50, start, "b", 100)
    loop.run(10**6, lambda: False)
    # a: 50 alone, its other 50 take 100 beside b; b: 50 of 100 done by then, the rest alone.
    assert ended == {"a": 150, "b": 200}


def test_no_slowdown_is_no_sharing() -> None:
    loop = EventLoop()
    cores = SharedCores(loop, [1.0, 1.0])
    ended: list[int] = []
    for begin, work in ((0, 70), (10, 20), (95, 5)):
        loop.at(begin, cores.after, work, lambda: ended.append(loop.now_ns))
    loop.run(10**6, lambda: False)
    assert ended == [30, 70, 100]


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_equal_work_ends_together(stages: int) -> None:
    loop = EventLoop()
    cores = SharedCores(loop, [1.0, 1.5, 3.0])
    ended: list[int] = []
    for _ in range(stages):
        cores.after(1000, lambda: ended.append(loop.now_ns))
    loop.run(10**6, lambda: False)
    assert ended == [1000 * [1.0, 1.5, 3.0][stages - 1]] * stages
