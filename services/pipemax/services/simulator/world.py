"""A whole system in virtual time: the shipped cores between modelled stages and modelled links.

Start, recovery and every step go through the same events as in the real processes: Hello, ready,
Reset, attaching, then plans, activations, Computed, Loaded and StepDone, each a message latency
apart. Activations share the host links with KV. What can go wrong is in `faults`. Not modelled: the
time of `prepare` and `send`, which the performance model has in its fixed part (measured costs have
it apart).
"""

import math
import random
from collections.abc import Callable

from pipemax.kv_daemon.events import FromStage
from pipemax.proto import PROTOCOL_VERSION
from pipemax.proto.errors import InvariantError
from pipemax.proto.memory import MemfdHandle
from pipemax.proto.messages.control import Hello, KvReady, Reset, ResetDone, StageReady, StepPlan
from pipemax.proto.messages.kv import AttachPool, Loaded, PoolAttached
from pipemax.proto.messages.types import Message
from pipemax.services.simulator.coordinator import (
    END_OF_SEQUENCE,
    DaemonOrder,
    ModelledCoordinator,
)
from pipemax.services.simulator.cores import SharedCores
from pipemax.services.simulator.daemon import ModelledDaemon
from pipemax.services.simulator.engine import NS, EventLoop, to_ns
from pipemax.services.simulator.faults import DAEMON_INDEX
from pipemax.services.simulator.injection import begin as begin_fault
from pipemax.services.simulator.links import Lane, make_links
from pipemax.services.simulator.recorder import Recorder
from pipemax.services.simulator.records import Interval, Result, StateRecord
from pipemax.services.simulator.spec import SimulationSpec
from pipemax.services.simulator.stage import ModelledStage, PlannedStep
from pipemax.stage_worker.modelled.loads import modelled_sweep
from pipemax.stage_worker.sweep import SweepLimits

DAEMON = "kv-daemon"
_NO_HANDLE = MemfdHandle(pid=0, fd=0, inode=0, size_bytes=0)
_VOCABULARY = 32_000


class World:
    """One run of a spec."""

    def __init__(
        self,
        spec: SimulationSpec,
        check_every: int = 0,
        on_progress: Callable[[float, int], None] | None = None,
    ) -> None:
        """`check_every`: check both cores' invariants after every so many events of the
        coordinator; 0 never does. `on_progress` hears simulated seconds and finished requests now
        and then."""
        self.spec = spec
        self.loop = EventLoop()
        intervals: list[Interval] = []
        self._draw = random.Random(f"jitter {spec.seed}")
        self._check_every = check_every
        self._coordinator_events = 0
        self._message_ns = to_ns(spec.timing.message_s)
        self._hop_ns = to_ns(spec.timing.hop_s)
        self._lengths = [lengths.output_tokens for lengths in spec.workload.requests]
        self._sweep_limits = SweepLimits(
            spec.max_num_seqs,
            spec.max_num_batched_tokens,
            spec.workload.max_model_len,
            spec.num_device_blocks,
            spec.block_size,
        )
        links = make_links(spec, self.loop)
        self.links = links
        self.coordinator = ModelledCoordinator(
            spec, self.loop, self._send_plan, self._send_reset, self._to_daemon, self._after_event
        )
        self.daemon = ModelledDaemon(
            spec, self.loop, links, self._draw, self._daemon_to_coordinator, self._daemon_to_stage
        )
        start_s, end_s = spec.gantt_s or (0.0, 0.0)
        window = (to_ns(start_s), to_ns(end_s))
        cores = spec.measured and spec.measured.compute_slowdown
        shared = SharedCores(self.loop, cores) if cores else None
        self.stages = [
            ModelledStage(
                index, costs, self.loop, StateRecord(index, window, intervals), self, shared
            )
            for index, costs in enumerate(spec.costs)
        ]
        self.muted: set[int] = set()
        self.repeating: set[int] = set()
        self._disk = Lane()
        self._recorder = Recorder(
            spec, self.loop, self.coordinator, self.stages, links, intervals, on_progress
        )

    def run(self) -> Result:
        """Until all requests have finished or the horizon is reached. Raises InvariantError when
        nothing can happen any more although requests are unfinished."""
        spec = self.spec
        self.coordinator.submit_all(spec)
        for stage in self.stages:
            self.start_stage(stage)
        self.start_daemon()
        for fault in spec.faults:
            self.loop.at(to_ns(fault.at_s), begin_fault, self, fault)
        self._recorder.start()
        total = math.ceil(spec.stop_when_finished * len(self._lengths))
        outputs = self.coordinator.outputs
        self.loop.run(to_ns(spec.horizon_s), lambda: len(outputs) >= total)
        if self.loop.now_ns < to_ns(spec.horizon_s) and len(outputs) < total:
            raise InvariantError(f"nothing happens, and {total - len(outputs)} requests wait")
        return self._recorder.result()

    # What stages say

    def computed(self, stage: ModelledStage, planned: PlannedStep, compute_ns: int) -> None:
        """See stage.Surroundings."""
        loop = self.loop
        epoch, step = planned.epoch, planned.step
        tokens: list[int] | None = None
        if stage.index + 1 < len(self.stages):
            successor = self.stages[stage.index + 1]
            rows = planned.load.decode_rows + planned.load.prefill_rows
            loop.at(
                self._carried_ns(stage, rows) + self._hop_ns,
                self._rows_arrive,
                successor,
                epoch,
                step,
                successor.incarnation,
            )
        else:
            tokens = [self._token(row.seed, row.position) for row in planned.plan.sample]
        if stage.index in self.muted:
            return
        loop.after(
            self._message_ns,
            self._reports_arrive,
            stage.index,
            planned,
            compute_ns / NS,
            stage.take_wait_kv_ns() / NS,
            tokens,
            self.daemon.incarnation,
        )

    def _carried_ns(self, stage: ModelledStage, rows: int) -> int:
        """When activations of `rows` tokens have reached the next stage. Cards without peer access
        send them through host memory: out over one link, in over the next."""
        now_ns = self.loop.now_ns
        if self.spec.measured:
            return now_ns + to_ns(rows * self.spec.measured.hop_row_s)
        if self.spec.free_prefill:
            return now_ns
        num_bytes = self.spec.stages[stage.index].hop_bytes(rows)
        out_ns = self.links[stage.index].carry("store", num_bytes, now_ns)
        return self.links[stage.index + 1].carry("load", num_bytes, out_ns)

    def vary(self, compute_ns: int) -> int:
        jitter = self.spec.timing.compute_jitter
        if not jitter:
            return compute_ns
        return round(compute_ns * max(0.1, self._draw.gauss(1.0, jitter)))

    def _reports_arrive(
        self,
        stage: int,
        planned: PlannedStep,
        compute_s: float,
        wait_kv_s: float,
        tokens: list[int] | None,
        daemon_incarnation: int,
    ) -> None:
        """Computed at the daemon, then StepDone at the coordinator."""
        epoch, step = planned.epoch, planned.step
        self.daemon.computed(stage, epoch, step, daemon_incarnation)
        self.coordinator.step_done(epoch, stage, step, compute_s, wait_kv_s, tokens)

    def _rows_arrive(self, stage: ModelledStage, epoch: int, step: int, incarnation: int) -> None:
        if incarnation == stage.incarnation:
            self._deliver(stage, stage.add_rows, epoch, step)

    def _deliver(
        self, stage: ModelledStage, handle: Callable[..., None], *arguments: object
    ) -> None:
        """Now, or when the stage wakes: then in the order of arrival."""
        if self.loop.now_ns <= stage.awake_ns:
            self.loop.at(
                stage.awake_ns, self._deliver_late, stage, stage.incarnation, handle, arguments
            )
        else:
            handle(*arguments)

    def _deliver_late(
        self,
        stage: ModelledStage,
        incarnation: int,
        handle: Callable[..., None],
        arguments: tuple[object, ...],
    ) -> None:
        if incarnation == stage.incarnation:
            handle(*arguments)

    def _token(self, key: int, position: int) -> int:
        """The request's output ends where the workload says; until then any token will do."""
        if position + 1 >= self._lengths[key]:
            return END_OF_SEQUENCE
        return 1 + (key * 7919 + position) % (_VOCABULARY - 1)

    # What the coordinator says

    def _send_plan(self, plan: StepPlan) -> None:
        self.loop.after(self._message_ns, self._plan_arrives, PlannedStep(plan))

    def _plan_arrives(self, planned: PlannedStep) -> None:
        for stage in self.stages:
            self._deliver(stage, stage.add_plan, planned)

    def _send_reset(self, reset: Reset) -> None:
        self.loop.after(self._message_ns, self._reset_arrives, reset)

    def _reset_arrives(self, reset: Reset) -> None:
        self.daemon.feed(reset)
        for stage in self.stages:
            if stage.alive:
                self._deliver(stage, self._reset_stage, stage, reset.epoch)

    def _reset_stage(self, stage: ModelledStage, epoch: int) -> None:
        stage.reset(epoch)
        offer = AttachPool(
            epoch=epoch,
            stage=stage.index,
            handle=_NO_HANDLE,
            num_blocks=self.spec.num_device_blocks,
            block_bytes=self.spec.block_bytes[stage.index],
        )
        self.loop.after(self._message_ns, self._attach, offer)
        if stage.index in self.repeating:
            # Said again in the moment before PoolAttached comes; the daemon hears it after that.
            self.loop.after(3 * self._message_ns, self._attach, offer)

    def _attach(self, offer: AttachPool) -> None:
        self.daemon.feed(FromStage(offer.stage, offer))

    def _to_daemon(self, message: DaemonOrder) -> None:
        self.loop.after(self._message_ns, self._daemon_hears, message, self.daemon.incarnation)

    def _daemon_hears(self, message: DaemonOrder, incarnation: int) -> None:
        if incarnation == self.daemon.incarnation:
            self.daemon.feed(message)

    # What the daemon says

    def _daemon_to_coordinator(self, message: Message) -> None:
        if DAEMON_INDEX in self.muted:
            return
        self.loop.after(self._message_ns, self.coordinator.from_daemon, DAEMON, message)

    def _daemon_to_stage(self, index: int, message: Message) -> None:
        stage = self.stages[index]
        if DAEMON_INDEX not in self.muted:
            self.loop.after(self._message_ns, self._stage_hears, stage, message, stage.incarnation)

    def _stage_hears(self, stage: ModelledStage, message: Message, incarnation: int) -> None:
        if incarnation != stage.incarnation:
            return
        match message:
            case Loaded(epoch=epoch, step=step):
                self._deliver(stage, stage.add_loaded, epoch, step)
            case PoolAttached(epoch=epoch):
                self._deliver(stage, self._stage_attached, stage, epoch)

    def _stage_attached(self, stage: ModelledStage, epoch: int) -> None:
        """The ring with the neighbours is agreed meanwhile; that takes no longer."""
        if epoch == stage.epoch and stage.index not in self.muted:
            done = ResetDone(epoch=epoch)
            name = f"stage-{stage.index}"
            self.loop.after(self._message_ns, self.coordinator.reset_done, name, done)

    # Starts, crashes and slowness

    def start_stage(self, stage: ModelledStage) -> None:
        name = f"stage-{stage.index}"
        self._say_hello(name, "stage", stage.index, stage.incarnation)
        first = sum(self.spec.layers[: stage.index])
        weights_s = stage.model.weights_bytes / self.spec.timing.disk_bytes_s
        read_ns = self._disk.take(self.loop.now_ns, to_ns(weights_s))
        ready = StageReady(
            stage=stage.index,
            layers=(first, first + self.spec.layers[stage.index]),
            num_blocks=self.spec.num_device_blocks,
            block_bytes=self.spec.block_bytes[stage.index],
            weights_bytes=round(stage.model.weights_bytes),
            load_s=(read_ns - self.loop.now_ns) / NS + self.spec.timing.load_s,
            activation_transport="shm",
            sweep=modelled_sweep(stage.model, self._sweep_limits),
        )
        ready_ns = read_ns + to_ns(self.spec.timing.load_s) + self._message_ns
        self.loop.at(ready_ns, self._stage_ready, stage, stage.incarnation, name, ready)

    def _stage_ready(
        self, stage: ModelledStage, incarnation: int, name: str, ready: StageReady
    ) -> None:
        """One that crashed while it loaded never says so."""
        if incarnation == stage.incarnation:
            self.coordinator.ready(name, ready)

    def start_daemon(self) -> None:
        self._say_hello(DAEMON, "kv_daemon", 0, self.daemon.incarnation)
        ready = KvReady(pool_bytes=self.spec.host_bytes)
        self.loop.after(self._message_ns, self.coordinator.ready, DAEMON, ready)

    def say_hello_again(self, stage: ModelledStage) -> None:
        """As a stage does at every tick."""
        if stage.alive:
            self._say_hello(f"stage-{stage.index}", "stage", stage.index, stage.incarnation)

    def _say_hello(self, name: str, role: str, index: int, incarnation: int) -> None:
        hello = Hello(
            protocol=PROTOCOL_VERSION,
            role="stage" if role == "stage" else "kv_daemon",
            index=index,
            pid=index + 1,
            incarnation=f"{name} {incarnation}",
        )
        self.loop.after(self._message_ns, self.coordinator.hello, name, hello)

    def _after_event(self) -> None:
        self._coordinator_events += 1
        if self._check_every and self._coordinator_events % self._check_every == 0:
            self.coordinator.scheduler.check_invariants()
            self.daemon.core.check_invariants()
        self._recorder.after_event()


def simulate(spec: SimulationSpec) -> Result:
    """Runs a spec to its end."""
    return World(spec).run()
