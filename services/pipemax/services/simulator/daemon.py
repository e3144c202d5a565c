"""The KV daemon's core between modelled links: what its shell and its copy engine do."""

import random
from collections.abc import Callable, Sequence

from pipemax.kv_daemon.core import KvCore
from pipemax.kv_daemon.events import (
    Command,
    CopyDone,
    Direction,
    Event,
    FromStage,
    LayOutHost,
    MapPool,
    PoolMapped,
    Run,
    SendToCoordinator,
    SendToStage,
    StartCopy,
)
from pipemax.kv_daemon.transfers import Move
from pipemax.proto.messages.control import KvReport
from pipemax.proto.messages.kv import Computed
from pipemax.proto.messages.types import Message
from pipemax.services.simulator.engine import EventLoop, to_ns
from pipemax.services.simulator.links import Link
from pipemax.services.simulator.spec import SimulationSpec

REPORT_INTERVAL_NS = to_ns(0.1)
"""As the daemon's shell: at most one KvReport in this time."""


class ModelledDaemon:
    """Feeds the shipped core and carries out its commands; survives crashes as a new, empty one."""

    def __init__(
        self,
        spec: SimulationSpec,
        loop: EventLoop,
        links: list[Link],
        draw: random.Random,
        to_coordinator: Callable[[Message], None],
        to_stage: Callable[[int, Message], None],
    ) -> None:
        self.alive = True
        self.incarnation = 0
        self.awake_ns = -1
        """Until then it does nothing: stopped, or swapped out."""
        self._spec = spec
        self._loop = loop
        self._links = links
        self._draw = draw
        self._copy_ns = to_ns(spec.timing.copy_s)
        self._to_coordinator = to_coordinator
        self._to_stage = to_stage
        self._report_due = False
        self.core = self._new_core()

    def crash(self) -> None:
        """The host pool is gone, and every copy's end is nobody's business."""
        self.alive = False
        self.awake_ns = -1
        self.incarnation += 1

    def restart(self) -> None:
        self.alive = True
        self._report_due = False
        self.core = self._new_core()

    def computed(self, stage: int, epoch: int, step: int, incarnation: int) -> None:
        """A stage's Computed message arrives."""
        if incarnation == self.incarnation:
            self.feed(FromStage(stage, Computed(epoch=epoch, step=step)))

    def feed(self, event: Event) -> None:
        """An event for the core, now or when the daemon wakes; a dead one hears nothing."""
        if not self.alive:
            return
        if self._loop.now_ns <= self.awake_ns:
            self._loop.at(self.awake_ns, self._feed_late, event, self.incarnation)
        else:
            self._handle(event)

    def _feed_late(self, event: Event, incarnation: int) -> None:
        if incarnation == self.incarnation:
            self._handle(event)

    def _handle(self, event: Event) -> None:
        if not self._report_due:
            self._report_due = True
            self._loop.after(REPORT_INTERVAL_NS, self._report, self.incarnation)
        for command in self.core.handle(event, self._loop.now):
            self._obey(command)

    def _new_core(self) -> KvCore:
        spec = self._spec
        return KvCore(spec.num_gpus, spec.host_bytes, spec.piece_bytes, merge_runs=_as_one_run)

    def _obey(self, command: Command) -> None:
        match command:
            case StartCopy(stage, direction, runs):
                num_blocks = sum([run.length for run in runs])
                num_bytes = num_blocks * self._spec.block_bytes[stage]
                self._links[stage].copy(
                    direction,
                    num_bytes,
                    len(runs),
                    self._draw,
                    self._copy_ns,
                    self._copy_done,
                    stage,
                    direction,
                    self.incarnation,
                )
            case SendToStage(stage, message):
                self._to_stage(stage, message)
            case SendToCoordinator(message):
                self._to_coordinator(message)
            case MapPool(offer):
                self._handle(PoolMapped(offer))
            case LayOutHost():
                pass  # modelled memory has no regions

    def _copy_done(self, stage: int, direction: Direction, incarnation: int) -> None:
        if incarnation == self.incarnation:
            self.feed(CopyDone(stage, direction))

    def _report(self, incarnation: int) -> None:
        if incarnation != self.incarnation:
            return
        self._report_due = False
        self._to_coordinator(
            KvReport(
                host_blocks_total=self.core.host_blocks_total,
                host_blocks_used=self.core.host_blocks_used,
                links=tuple(link.report() for link in self._links),
                queued_load_bytes=self.core.queued_load_bytes(),
            )
        )


def _as_one_run(moves: Sequence[Move]) -> tuple[Run, ...]:
    """A modelled copy takes as long as its bytes; where they lie does not matter."""
    return (Run(0, 0, len(moves)),)
