"""Modelled links: what shares a lane, host memory, and activations among copies."""

import random
from dataclasses import replace

import pytest

from pipemax.kv_daemon.core import PIECE_BYTES
from pipemax.kv_daemon.events import Direction
from pipemax.services.simulator.engine import NS, EventLoop
from pipemax.services.simulator.links import Lane, Link, make_links
from pipemax.services.simulator.spec import IDEAL, SimulationSpec
from pipemax.services.simulator.workload import lognormal
from pipemax.stage_worker.modelled.catalogue import load_catalogue

CATALOGUE = load_catalogue()
GB = 10**9


def make(host_memory_bytes_s: float = 1e15, **changes: object) -> tuple[EventLoop, list[Link]]:
    spec = SimulationSpec(
        gpu=replace(CATALOGUE.gpu("rtx-3090"), link_bytes_s=GB),
        num_gpus=4,
        model=CATALOGUE.model("llama-2-13b"),
        workload=lognormal("x", 10, 10, 1, seed=0, sigma=0),
        timing=replace(IDEAL, host_memory_bytes_s=host_memory_bytes_s),
    )
    loop = EventLoop()
    return loop, make_links(replace(spec, **changes), loop)  # type: ignore[arg-type]


def copy(links: list[Link], link: int, direction: Direction, num_bytes: int) -> list[float]:
    """A list that will hold when the copy ended."""
    ended: list[float] = []
    one = links[link]
    one.copy(direction, num_bytes, 1, random.Random(0), 0, lambda: ended.append(one._loop.now))
    return ended


def run(loop: EventLoop) -> None:
    loop.run(10**15, lambda: False)


def test_directions_and_links_are_independent() -> None:
    loop, links = make()
    ended = [copy(links, 0, "load", GB), copy(links, 0, "store", GB), copy(links, 1, "load", GB)]
    run(loop)
    assert ended == [[1.0]] * 3


def test_all_links_share_host_memory() -> None:
    loop, links = make(host_memory_bytes_s=2 * GB)
    ended = [copy(links, index, "load", GB) for index in range(4) for _ in range(5)]
    run(loop)
    assert max(ended) == [pytest.approx(10.0)]  # 20 GB at 2 GB/s, although each link has 1 GB/s
    alone_loop, alone = make(host_memory_bytes_s=2 * GB)
    last = [copy(alone, 0, "load", GB) for _ in range(5)][-1]
    run(alone_loop)
    assert last == [5.0]


def test_activations_overtake_copies_and_delay_those_that_follow() -> None:
    loop, links = make()
    first = copy(links, 0, "load", GB)
    half_s = 0.5
    arrived_ns = links[0].carry("load", half_s * GB, 0)
    assert arrived_ns / NS == pytest.approx(half_s + PIECE_BYTES / GB)
    second = copy(links, 0, "load", GB)
    run(loop)
    assert (first, second) == ([1.0], [2.0 + half_s])
    assert links[0].report().load_bytes == 2 * GB, "activations are no KV"


def test_activations_on_an_idle_link_wait_for_nobody() -> None:
    _, links = make()
    assert links[2].carry("store", GB, 3 * NS) == 4 * NS


def test_a_slow_link_is_slow_for_both() -> None:
    loop, links = make()
    links[0].speed = 0.5
    ended = copy(links, 0, "load", GB)
    assert links[1].carry("load", GB, 0) == NS
    assert links[0].carry("store", GB, 0) == 2 * NS
    run(loop)
    assert ended == [2.0]


def test_a_lane_works_on_one_transfer_at_a_time() -> None:
    lane = Lane()
    assert [lane.take(0, 5), lane.take(2, 5), lane.take(20, 5)] == [5, 10, 25]
