"""Copies that each stage makes itself, as it is told: no CUDA here."""

import contextlib
import logging
import os
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from pipemax.kv_daemon.engine import HostLayout
from pipemax.kv_daemon.events import DIRECTIONS, Direction, PoolMapped, StartCopy
from pipemax.kv_daemon.host_pool import Blocks
from pipemax.proto.errors import PipemaxSystemError
from pipemax.proto.memory import MemfdHandle
from pipemax.proto.messages.control import LinkTotals
from pipemax.proto.messages.kv import AttachPool, CopyEnded, CopyOrder, HostRegion

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Lane:
    """One stage in one direction."""

    under_way: deque[int] = field(default_factory=deque)
    """Numbers of the copies ordered and not ended."""
    bytes: int = 0
    busy_s: float = 0.0
    copies: int = 0


class OrderEngine:
    """CopyEngine for stages with streams of their own.

    A stage that died took its copies with it. They end when its successor attaches, and not before:
    by then a new epoch has made them void, and a store that was never made counts as none.

    handle: the host pool's; None without one.
    """

    orders_computing = True

    def __init__(self, layout: HostLayout, handle: MemfdHandle | None) -> None:
        self._layout = layout
        self._handle = handle
        num_stages = len(layout.block_bytes)
        self._lanes = {(s, d): _Lane() for s in range(num_stages) for d in DIRECTIONS}
        self._incarnations: list[str | None] = [None] * num_stages
        self._done: list[tuple[int, Direction]] = []
        self._event_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def fileno(self) -> int:
        return self._event_fd

    def map_pool(self, offer: AttachPool) -> PoolMapped:
        """Maps nothing; says where the stage's region lies."""
        stage = offer.stage
        if offer.handle is not None or offer.cuda is not None:
            raise PipemaxSystemError(f"stage {stage} offers a pool, and is to copy for itself")
        if self._incarnations[stage] != offer.incarnation:
            self._incarnations[stage] = offer.incarnation
            self._end_all(stage)
        return PoolMapped(offer, region=self.region(stage))

    def region(self, stage: int) -> HostRegion | None:
        """None without a host pool."""
        if self._handle is None or not self._layout.num_blocks:
            return None
        return HostRegion(
            handle=self._handle,
            offset_bytes=self._layout.part(stage)[0],
            num_blocks=self._layout.num_blocks,
            block_bytes=self._layout.block_bytes[stage],
        )

    def let_go(self, stage: int) -> bool:
        return True

    def held_bytes(self, block_bytes: tuple[int, ...]) -> tuple[int, ...]:
        return block_bytes

    def lay_out(self, regions: tuple[Blocks, ...]) -> None:
        self._layout.check(regions)

    def start(self, copy: StartCopy) -> CopyOrder:
        self._lanes[copy.stage, copy.direction].under_way.append(copy.number)
        return CopyOrder(
            number=copy.number,
            direction=copy.direction,
            after=copy.after,
            runs=np.array(copy.runs, "<i4").tobytes(),
        )

    def copy_ended(self, stage: int, message: CopyEnded) -> None:
        """Numbers that are not under way are another process's: of the stage before this one, or
        ordered by the daemon before this one."""
        lane = self._lanes[stage, message.direction]
        if not lane.under_way or not lane.under_way[0] <= message.number <= lane.under_way[-1]:
            log.info("stage %d ended a %s that is not under way", stage, message.direction)
            return
        lane.bytes += message.bytes
        lane.busy_s += message.busy_s
        lane.copies += message.copies
        self._end(stage, message.direction, message.number)

    def completed(self) -> list[tuple[int, Direction]]:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._event_fd)
        done, self._done = self._done, []
        return done

    def totals(self) -> tuple[LinkTotals, ...]:
        totals = []
        for stage in range(len(self._incarnations)):
            load, store = self._lanes[stage, "load"], self._lanes[stage, "store"]
            totals.append(
                LinkTotals(
                    load_bytes=load.bytes,
                    load_seconds=load.busy_s,
                    load_copies=load.copies,
                    store_bytes=store.bytes,
                    store_seconds=store.busy_s,
                    store_copies=store.copies,
                )
            )
        return tuple(totals)

    def close(self) -> None:
        """The stages' copies are theirs; they see that the daemon is gone. Safe to call twice."""
        if self._event_fd >= 0:
            os.close(self._event_fd)
            self._event_fd = -1

    def _end_all(self, stage: int) -> None:
        for direction in DIRECTIONS:
            under_way = self._lanes[stage, direction].under_way
            if under_way:
                self._end(stage, direction, under_way[-1])

    def _end(self, stage: int, direction: Direction, number: int) -> None:
        """This copy and those before it."""
        under_way = self._lanes[stage, direction].under_way
        while under_way and under_way[0] <= number:
            under_way.popleft()
            self._done.append((stage, direction))
        os.eventfd_write(self._event_fd, 1)
