"""Modelled host links: one lane per direction, shared by the GPUs behind one uplink, all of them
reading and writing one host memory. Activations go first."""

import random
from collections.abc import Callable

from pipemax.kv_daemon.core import PIECE_BYTES
from pipemax.kv_daemon.events import DIRECTIONS, Direction
from pipemax.proto.messages.control import LinkTotals
from pipemax.services.simulator.engine import NS, EventLoop, to_ns
from pipemax.services.simulator.spec import SimulationSpec


class Lane:
    """What works on one transfer at a time: one direction of one uplink, or host memory. Copies
    take their turns at the full rate; the daemon keeps two under way per stage, so that GPUs that
    share an uplink alternate and each gets its part."""

    __slots__ = ("free_ns",)

    def __init__(self) -> None:
        self.free_ns = 0

    def take(self, from_ns: int, duration_ns: int) -> int:
        """Queues a transfer that may begin at `from_ns`; returns when it ends."""
        self.free_ns = max(from_ns, self.free_ns) + duration_ns
        return self.free_ns


class Link:
    """One stage's way to host memory and back. The directions do not slow each other, unless they
    share a lane.

    A copy occupies its lane and, for as long as its bytes take there, host memory; it ends when it
    is through both.
    """

    def __init__(
        self,
        loop: EventLoop,
        bytes_per_s: dict[Direction, float],
        lanes: dict[Direction, Lane],
        jitter: float = 0.0,
        memory: Lane | None = None,
        memory_bytes_s: float = float("inf"),
    ) -> None:
        self.speed = 1.0
        """Share of the nominal rate; faults lower it."""
        self.totals = dict.fromkeys(DIRECTIONS, (0, 0, 0))
        """(bytes, busy nanoseconds, copies) by direction, of KV. Busy is as the daemon's engine
        counts it: from when a copy could have begun, waiting for a shared uplink included."""
        self._loop = loop
        self._bytes_per_s = bytes_per_s
        self._lanes = lanes
        self._jitter = jitter
        self._memory = memory or Lane()
        self._memory_bytes_s = memory_bytes_s
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
        seconds = num_bytes / (self._bytes_per_s[direction] * self.speed)
        if self._jitter:
            seconds *= max(0.1, draw.gauss(1.0, self._jitter))
        end_ns = self._lanes[direction].take(now_ns, to_ns(seconds))
        end_ns = max(end_ns, self._memory.take(now_ns, to_ns(num_bytes / self._memory_bytes_s)))
        begin_ns = max(now_ns, self._last_end_ns[direction])
        self._last_end_ns[direction] = end_ns
        moved, busy_ns, copies = self.totals[direction]
        self.totals[direction] = (
            moved + num_bytes,
            busy_ns + end_ns - begin_ns,
            copies + num_runs,
        )
        self._loop.at(end_ns + notice_ns, then, *arguments)

    def carry(self, direction: Direction, num_bytes: float, from_ns: int) -> int:
        """Activations that are there at `from_ns`; returns when they are through.

        They overtake all copies but the piece under way (the daemon's real pieces; simulated ones
        are larger to save events). What they take is taken from copies started later: those that
        were started already keep their end.
        """
        rate = self._bytes_per_s[direction] * self.speed
        lane = self._lanes[direction]
        wait_ns = min(max(0, lane.free_ns - from_ns), to_ns(PIECE_BYTES / rate))
        carry_ns = to_ns(num_bytes / rate)
        lane.take(self._loop.now_ns, carry_ns)
        self._memory.take(self._loop.now_ns, to_ns(num_bytes / self._memory_bytes_s))
        return from_ns + wait_ns + carry_ns

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


def make_links(spec: SimulationSpec, loop: EventLoop) -> list[Link]:
    """One link per stage; stages of a group share their lanes, and all share host memory."""
    memory = Lane()
    lanes: dict[int, dict[Direction, Lane]] = {}
    links: list[Link] = []
    for group, rates in zip(spec.link_groups, spec.link_rates, strict=True):
        if group not in lanes:
            load = Lane()
            lanes[group] = {"load": load, "store": Lane() if spec.duplex_links else load}
        links.append(
            Link(
                loop,
                dict(zip(DIRECTIONS, rates, strict=True)),
                lanes[group],
                spec.timing.link_jitter,
                memory,
                spec.timing.host_memory_bytes_s,
            )
        )
    return links
