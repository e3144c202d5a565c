"""Modelled host links: one lane per direction, shared by the GPUs behind one uplink."""

import random
from collections.abc import Callable

from pipemax.kv_daemon.events import DIRECTIONS, Direction
from pipemax.proto.messages.control import LinkTotals
from pipemax.services.simulator.engine import NS, EventLoop, to_ns


class Lane:
    """One direction of one uplink. Copies take their turns at the full rate; the daemon keeps two
    under way per stage, so that GPUs that share an uplink alternate and each gets its part."""

    __slots__ = ("free_ns",)

    def __init__(self) -> None:
        self.free_ns = 0


class Link:
    """One stage's way to host memory and back. The directions do not slow each other."""

    def __init__(
        self, loop: EventLoop, bytes_per_s: float, lanes: dict[Direction, Lane], jitter: float
    ) -> None:
        self.speed = 1.0
        """Share of the nominal rate; faults lower it."""
        self.totals = dict.fromkeys(DIRECTIONS, (0, 0, 0))
        """(bytes, busy nanoseconds, copies) by direction. Busy is as the daemon's engine counts
        it: from when a copy could have begun, waiting for a shared uplink included."""
        self._loop = loop
        self._bytes_per_s = bytes_per_s
        self._lanes = lanes
        self._jitter = jitter
        self._last_end_ns = dict.fromkeys(DIRECTIONS, 0)

    def copy(
        self,
        direction: Direction,
        num_bytes: int,
        num_runs: int,
        draw: random.Random,
        notice_ns: int,
        then: Callable[..., None],
        *arguments: object,
    ) -> None:
        """Starts a copy behind those before it; calls `then` `notice_ns` after the last byte is
        there."""
        now_ns = self._loop.now_ns
        lane = self._lanes[direction]
        seconds = num_bytes / (self._bytes_per_s * self.speed)
        if self._jitter:
            seconds *= max(0.1, draw.gauss(1.0, self._jitter))
        end_ns = max(now_ns, lane.free_ns) + to_ns(seconds)
        begin_ns = max(now_ns, self._last_end_ns[direction])
        lane.free_ns = self._last_end_ns[direction] = end_ns
        moved, busy_ns, copies = self.totals[direction]
        self.totals[direction] = (
            moved + num_bytes,
            busy_ns + end_ns - begin_ns,
            copies + num_runs,
        )
        self._loop.at(end_ns + notice_ns, then, *arguments)

    def report(self) -> LinkTotals:
        """As the daemon reports it."""
        load_bytes, load_ns, load_copies = self.totals["load"]
        store_bytes, store_ns, store_copies = self.totals["store"]
        return LinkTotals(
            load_bytes=load_bytes,
            load_seconds=load_ns / NS,
            load_copies=load_copies,
            store_bytes=store_bytes,
            store_seconds=store_ns / NS,
            store_copies=store_copies,
        )


def make_links(
    loop: EventLoop, num_stages: int, bytes_per_s: float, per_uplink: int, jitter: float
) -> list[Link]:
    """One link per stage; `per_uplink` neighbours share their lanes."""
    links: list[Link] = []
    lanes: dict[Direction, Lane] = {}
    for stage in range(num_stages):
        if stage % per_uplink == 0:
            lanes = {direction: Lane() for direction in DIRECTIONS}
        links.append(Link(loop, bytes_per_s, lanes, jitter))
    return links
