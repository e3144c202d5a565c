"""Copies on the daemon's own streams, between the host pool and the pools that stages share.

It takes a CUDA context on every GPU; `order_engine.py` does without. One call into CUDA for each
run: cudaMemcpyBatchAsync would take all runs of a piece at once, but cupy (14) does not wrap it,
and the package that does, cuda.bindings, belongs neither to cupy nor to PipeMax.
"""

import contextlib
import logging
import os
import select
import time
from collections import Counter, deque
from dataclasses import dataclass, field

import msgspec

from pipemax.kv_daemon.context_memory import context_bytes
from pipemax.kv_daemon.cuda_link import CudaLink, EndedCopy, HostPart
from pipemax.kv_daemon.engine import HostLayout
from pipemax.kv_daemon.events import DIRECTIONS, Direction, PoolMapped, StartCopy
from pipemax.kv_daemon.host_pool import Blocks, HostPool
from pipemax.proto import cuda
from pipemax.proto.cuda.pinned import PinnedMemory, next_page, warn_of_memlock
from pipemax.proto.cuda.runtime import CudaRuntime
from pipemax.proto.errors import PipemaxSystemError, WireError
from pipemax.proto.messages.control import LinkTotals
from pipemax.proto.messages.kv import AttachPool, CopyEnded

STUCK_S = 5.0
"""Longest that copies may take to end once their stage is known to be gone."""
CLOSE_S = 2.0
"""The same when the daemon leaves."""

log = logging.getLogger(__name__)


class CopiesStuckError(Exception):
    """Copies of a stage that died do not end, and may still write to the host pool. Not a
    PipemaxError: the launcher starts a daemon with another pool, and what this one held is computed
    again."""


@dataclass(slots=True)
class _Stage:
    link: CudaLink | None = None
    retired: CudaLink | None = None
    """Of the process before, until its copies have ended."""
    give_up_s: float = 0.0
    """`time.monotonic` by which they must have."""
    started: Counter[Direction] = field(default_factory=Counter)
    """Copies started and not reported as ended."""
    owed: Counter[Direction] = field(default_factory=Counter)
    """The same of the process before, once the next one has attached."""
    totals: LinkTotals = field(default_factory=LinkTotals)


class CudaEngine:
    """CopyEngine for stages whose pools the daemon opens.

    A stage's process that died takes its link with it. What was under way on it is reported as
    ended when the successor attaches and the old streams are at rest; until then a new epoch has
    made it void. Streams that never come to rest end the daemon (CopiesStuckError).

    gpus: by stage, ordinals as the stages count them; an offer names the GPU by its PCI bus id.
    """

    orders_computing = True

    def __init__(self, layout: HostLayout, gpus: tuple[int, ...], pool: HostPool) -> None:
        self._layout = layout
        self._pool = pool
        runtimes = {gpu: cuda.open_runtime(gpu) for gpu in dict.fromkeys(gpus)}
        self.pci_bus_ids = tuple(runtimes[gpu].properties().pci_bus_id for gpu in gpus)
        self._runtimes = dict(zip(self.pci_bus_ids, map(runtimes.__getitem__, gpus), strict=True))
        self._pages = PinnedMemory(runtimes[gpus[0]])
        self._address = pool.address if pool.size_bytes else 0
        self._stages = [_Stage() for _ in gpus]
        self._done: deque[tuple[int, Direction]] = deque()
        self._event_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._closed = False
        for runtime in runtimes.values():
            runtime.memory()  # makes the context
        self._context_bytes = context_bytes(self.pci_bus_ids)
        warn_of_memlock(pool.size_bytes)

    def pin(self, begin: int, end: int) -> None:
        """Pins the pages that begin in [begin, end) of the pool; from one other thread."""
        first = next_page(self._address + begin)
        last = next_page(self._address + end)
        if first < last:
            self._pages.pin(first, last, lambda: self._pool.closing)

    def context_bytes(self) -> tuple[int, ...]:
        """See KvReady; empty where the driver's tool does not say."""
        return self._context_bytes

    def fileno(self) -> int:
        return self._event_fd

    def region(self, stage: int) -> None:
        return None

    def map_pool(self, offer: AttachPool) -> PoolMapped:
        """Opens what is offered, once for each process of the stage."""
        stage = self._stages[offer.stage]
        if stage.link is None or stage.link.incarnation != offer.incarnation:
            runtime = self._runtime_for(offer)
            self._retire(stage)
            stage.link = CudaLink(runtime, offer, self._host_part(offer.stage), self._event_fd)
            for direction in DIRECTIONS:
                stage.owed[direction] += stage.started[direction]
                stage.started[direction] = 0
            self._settle(offer.stage)
        return PoolMapped(offer, loaded=stage.link.loaded_handles)

    def let_go(self, stage: int) -> bool:
        found = self._stages[stage]
        if found.link is not None and not found.link.is_alive:
            self._retire(found)
            self._settle(stage)
        return found.retired is None

    def held_bytes(self, block_bytes: tuple[int, ...]) -> tuple[int, ...]:
        return block_bytes

    def lay_out(self, regions: tuple[Blocks, ...]) -> None:
        self._layout.check(regions)

    def start(self, copy: StartCopy) -> None:
        """What is started while the stage is away never runs."""
        stage = self._stages[copy.stage]
        stage.started[copy.direction] += 1
        if stage.link is not None:
            stage.link.start(copy)

    def copy_ended(self, stage: int, message: CopyEnded) -> None:
        raise WireError("unexpected", f"a copy_ended of stage {stage}, which makes no copies")

    def completed(self) -> list[tuple[int, Direction]]:
        """Raises CopiesStuckError as well."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._event_fd)
        for index, stage in enumerate(self._stages):
            if stage.link is not None:
                for ended in stage.link.passed():
                    stage.started[ended.direction] -= 1
                    stage.totals = _with(stage.totals, ended)
                    self._done.append((index, ended.direction))
            self._settle(index)
        done = list(self._done)
        self._done.clear()
        return done

    def totals(self) -> tuple[LinkTotals, ...]:
        return tuple(stage.totals for stage in self._stages)

    def close(self) -> None:
        """Safe to call twice. What does not come to rest is left to the end of the process."""
        if self._closed:
            return
        self._closed = True
        links = [link for stage in self._stages for link in (stage.link, stage.retired) if link]
        try:
            self._let_end(links)
            if any(link.num_under_way for link in links):
                log.warning("copies under way do not end; leaving them")
                return
            for link in links:
                link.close()
            self._pages.unpin()
        except PipemaxSystemError as error:
            log.warning("leaving what is on the GPUs to the end of this process: %s", error)
            return
        os.close(self._event_fd)

    def _let_end(self, links: list[CudaLink]) -> None:
        """Returns once no copy is under way, or after CLOSE_S."""
        give_up_s = time.monotonic() + CLOSE_S
        while any(link.num_under_way for link in links) and time.monotonic() < give_up_s:
            select.select([self._event_fd], [], [], CLOSE_S / 20)
            for link in links:
                link.passed()

    def _runtime_for(self, offer: AttachPool) -> CudaRuntime:
        if offer.cuda is None:
            raise PipemaxSystemError(f"stage {offer.stage} offers no pool on a GPU")
        runtime = self._runtimes.get(offer.cuda.pci_bus_id)
        if runtime is None:
            raise PipemaxSystemError(
                f"stage {offer.stage} is on GPU {offer.cuda.pci_bus_id}; the daemon sees "
                f"{', '.join(self._runtimes)}"
            )
        return runtime

    def _host_part(self, stage: int) -> HostPart:
        begin, _ = self._layout.part(stage)
        return HostPart(
            begin=self._address + begin,
            num_blocks=self._layout.num_blocks,
            block_bytes=self._layout.block_bytes[stage],
            pages=self._pages,
        )

    def _retire(self, stage: _Stage) -> None:
        """The process behind the stage's link is gone."""
        link, stage.link = stage.link, None
        if link is None:
            return
        if stage.retired is None:
            stage.retired = link
            stage.give_up_s = time.monotonic() + STUCK_S
        else:  # it came and went while older copies ran on, and so before it was given any
            link.close()

    def _settle(self, index: int) -> None:
        """Closes a retired link at rest; then what its process had under way is over, as soon as
        the next one is there."""
        stage = self._stages[index]
        if stage.retired is not None:
            stage.retired.passed()
            if stage.retired.num_under_way:
                if time.monotonic() > stage.give_up_s:
                    raise CopiesStuckError(
                        f"stage {index} died, and {stage.retired.num_under_way} copies that wait "
                        f"for it have not ended after {STUCK_S:.0f} s; starting anew, without what "
                        "the host pool holds"
                    )
                return
            stage.retired.close()
            stage.retired = None
        if stage.link is not None:
            for direction, count in stage.owed.items():
                self._done.extend([(index, direction)] * count)
            if stage.owed:
                stage.owed.clear()
                os.eventfd_write(self._event_fd, 1)


def _with(totals: LinkTotals, ended: EndedCopy) -> LinkTotals:
    if ended.direction == "load":
        return msgspec.structs.replace(
            totals,
            load_bytes=totals.load_bytes + ended.num_bytes,
            load_seconds=totals.load_seconds + ended.busy_s,
            load_copies=totals.load_copies + ended.num_runs,
        )
    return msgspec.structs.replace(
        totals,
        store_bytes=totals.store_bytes + ended.num_bytes,
        store_seconds=totals.store_seconds + ended.busy_s,
        store_copies=totals.store_copies + ended.num_runs,
    )
