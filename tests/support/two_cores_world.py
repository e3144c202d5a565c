"""Both shipped cores, and the assembly between them, driven together by random events.

Every message lies in a queue between its sender and its receiver, in order; whichever queue is read
next is drawn from a seeded generator, and so are copies' ends, steps' ends and deaths. Blocks hold
tokens: a copy reads its source twice, at its start and at its end, and leaves its target torn in
between, so that a block which is reused too early is noticed.
"""

import random
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from pipemax.coordinator.assembly import DAEMON, Action, Assembly, ResetAll, stage_name
from pipemax.coordinator.core import Scheduler
from pipemax.coordinator.events import (
    BlocksStored,
    Cancelled,
    Event,
    FinishRequest,
    KvReleased,
    LinkMeasured,
    Paused,
    Resumed,
    StageComputed,
    StepReturned,
    Submitted,
    ToDaemon,
    ToStages,
)
from pipemax.coordinator.phases import DEFAULT_PREFILL, make_prefill
from pipemax.coordinator.policy import DEFAULT_POLICY, make_policy
from pipemax.coordinator.state import SchedulerLimits
from pipemax.kv_daemon import events as kv_events
from pipemax.kv_daemon.core import KvCore
from pipemax.kv_daemon.events import Direction
from pipemax.proto.memory import MemfdHandle
from pipemax.proto.messages import control
from pipemax.proto.messages.control import StepPlan
from pipemax.proto.messages.ingest import SamplingParams
from pipemax.proto.messages.kv import AttachPool, Computed, Loaded, PoolAttached
from pipemax.proto.messages.types import Message, pack_i32, unpack_i32
from support.scheduler_world import EOS, Block, next_token, run_step

COORDINATOR = "coordinator"
BLOCK_BYTES = 64
TORN = [-7]
"""What a block holds while a copy into it is under way."""


@dataclass
class Stage:
    pool: list[Block]
    epoch: int = -1
    computed: int = -1
    plans: deque[StepPlan] = field(default_factory=deque)
    loaded: set[int] = field(default_factory=set)
    alive: bool = True
    incarnation: int = 0


@dataclass
class CopyUnderWay:
    runs: tuple[kv_events.Run, ...]
    pool: list[Block]
    read: list[Block]


class TwoCores:
    """`link_blocks`: blocks the links carry in the time of a step, as the daemon reports; None
    leaves them unmeasured and the prefetch budget unlimited."""

    def __init__(
        self,
        seed: int,
        *,
        stages: int,
        blocks: int,
        host: int,
        block_size: int,
        piece_blocks: int,
        slots: int | None = None,
        max_num_seqs: int = 8,
        max_num_batched_tokens: int = 32,
        link_blocks: float | None = None,
        policy: str = DEFAULT_POLICY,
        prefill: str = DEFAULT_PREFILL,
        share_prefixes: bool = False,
    ) -> None:
        self.random = random.Random(seed)
        self.size = block_size
        self.num_blocks = blocks
        self.host_blocks = host
        self.piece_blocks = piece_blocks
        self.link_blocks = link_blocks
        self.max_model_len = (blocks - 1) * block_size
        limits = SchedulerLimits(
            block_size=block_size,
            num_slots=slots or stages,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=self.max_model_len,
            eos_token_ids=EOS,
            share_prefixes=share_prefixes,
        )
        rule = make_prefill(prefill, limits.num_slots)
        self.scheduler = Scheduler(limits, make_policy(policy), rule)
        self.assembly = Assembly(stages)
        self.stages = [Stage([]) for _ in range(stages)]
        self.daemon: KvCore | None = None
        self.daemon_incarnation = 0
        self.host: list[list[Block]] = []
        self.mapped: list[list[Block]] = [[] for _ in range(stages)]
        self.copies: dict[tuple[int, Direction], deque[CopyUnderWay]] = {}
        self.queues: dict[tuple[str, str], deque[Message]] = {}
        self.finished: dict[int, FinishRequest] = {}
        self.events = 0
        self.start_daemon()
        for stage in range(stages):
            self.start_stage(stage)

    # Processes

    def start_stage(self, index: int) -> None:
        stage = self.stages[index]
        pool = [[-1] * self.size for _ in range(self.num_blocks)]
        self.stages[index] = Stage(pool, incarnation=stage.incarnation + 1)
        hello = control.Hello(
            protocol=1, role="stage", index=index, pid=1, incarnation=str(stage.incarnation)
        )
        ready = control.StageReady(
            stage=index,
            layers=(index, index + 1),
            num_blocks=self.num_blocks + index,
            block_bytes=BLOCK_BYTES,
            weights_bytes=1,
            load_s=0.0,
            activation_transport="shm",
        )
        self.send(stage_name(index), COORDINATOR, hello, ready)

    def start_daemon(self) -> None:
        num_stages = len(self.stages)
        host_bytes = self.host_blocks * BLOCK_BYTES * num_stages
        self.daemon = KvCore(num_stages, host_bytes, piece_bytes=self.piece_blocks * BLOCK_BYTES)
        self.host = [[[-1]] * self.host_blocks for _ in self.stages]
        self.copies = {(s, d): deque() for s in range(num_stages) for d in ("load", "store")}
        self.daemon_incarnation += 1
        name = str(self.daemon_incarnation)
        hello = control.Hello(protocol=1, role="kv_daemon", pid=1, incarnation=name)
        self.send(DAEMON, COORDINATOR, hello, control.KvReady(pool_bytes=host_bytes))

    def kill_stage(self, index: int) -> None:
        """What it had sent arrives; what is on its way to it does not."""
        self.stages[index].alive = False
        self.lose_messages_to(stage_name(index))

    def kill_daemon(self) -> None:
        """What it was copying into stays as it is: torn, but nobody writes there any more."""
        for (_, direction), queue in self.copies.items():
            for copy in queue if direction == "load" else ():
                for _, device_block in _pairs(copy.runs):
                    copy.pool[device_block] = TORN * self.size
        self.daemon = None
        self.lose_messages_to(DAEMON)

    def lose_messages_to(self, name: str) -> None:
        for (_, receiver), queue in self.queues.items():
            if receiver == name:
                queue.clear()

    def is_alive(self, name: str) -> bool:
        if name == DAEMON:
            return self.daemon is not None
        return name == COORDINATOR or self.stages[int(name.removeprefix("stage-"))].alive

    def send(self, sender: str, receiver: str, *messages: Message) -> None:
        if self.is_alive(receiver):
            self.queues.setdefault((sender, receiver), deque()).extend(messages)

    # Something happens

    def step(self) -> bool:
        """One thing happens; False when nothing can."""
        possible: list[tuple[str, Any]] = [
            ("read", link) for link, queue in self.queues.items() if queue and self.delivers(link)
        ]
        if self.daemon is None:
            possible.append(("start daemon", None))
        else:
            possible += [("copy", lane) for lane, queue in self.copies.items() if queue]
        for index, stage in enumerate(self.stages):
            if not stage.alive:
                possible.append(("start stage", index))
            elif stage.plans and self._may_compute(index):
                possible.append(("compute", index))
        if not possible:
            return False
        self.events += 1
        what, which = self.random.choice(possible)
        match what:
            case "read":
                self._read(*which)
            case "copy":
                self._end_copy(*which)
            case "compute":
                self._compute(which)
            case "start stage":
                self.start_stage(which)
            case "start daemon":
                self.start_daemon()
        return True

    def delivers(self, link: tuple[str, str]) -> bool:
        """Whether messages on this way, sender and receiver, can be read now."""
        return True

    def _read(self, sender: str, receiver: str) -> None:
        message = self.queues[sender, receiver].popleft()
        if receiver == COORDINATOR:
            self._coordinator_reads(sender, message)
        elif receiver == DAEMON and sender == COORDINATOR:
            assert isinstance(
                message,
                control.Reset | control.Prefetch | control.Store | control.Drop | control.Release,
            )
            self.tell_daemon(message)
        elif receiver == DAEMON:
            assert isinstance(message, AttachPool | Computed)
            index = int(sender.removeprefix("stage-"))
            self.tell_daemon(kv_events.FromStage(index, message))
        else:
            self._stage_reads(int(receiver.removeprefix("stage-")), message)

    # The coordinator's shell

    def tell(self, event: Event) -> None:
        for command in self.scheduler.handle(event, float(self.events)):
            match command:
                case ToStages(plan):
                    for index in range(len(self.stages)):
                        self.send(COORDINATOR, stage_name(index), plan)
                case ToDaemon(message):
                    self.send(COORDINATOR, DAEMON, message)
                case FinishRequest():
                    assert command.key not in self.finished, "a request finished twice"
                    self.finished[command.key] = command
        self.scheduler.check_invariants()

    def submit(self, key: int, prompt: list[int], sampling: SamplingParams) -> None:
        self.tell(Submitted(key, prompt, sampling, seed=0))

    def cancel(self, key: int) -> None:
        self.tell(Cancelled(key))

    def _coordinator_reads(self, sender: str, message: Message) -> None:
        current = self.assembly.running and getattr(message, "epoch", None) == self.assembly.epoch
        match message:
            case control.Hello():
                self._act(self.assembly.hello(sender, message))
            case control.StageReady() | control.KvReady():
                self._act(self.assembly.ready(sender, message))
            case control.ResetDone(epoch=epoch, num_host_blocks=num_host_blocks):
                self._act(self.assembly.reset_done(sender, epoch, num_host_blocks))
            case control.Stored(requests=keys, indices=indices) if current:
                self.tell(BlocksStored(keys, indices))
            case control.Released(requests=keys) if current:
                self.tell(KvReleased(keys))
            case control.KvReport(links=links) if links:
                sizes = [link.load_bytes for link in links]
                self.tell(LinkMeasured(sizes, [link.load_seconds for link in links]))
            case control.StepDone() if current:
                self.tell(StageComputed(message.stage, message.step, message.compute_s))
                if message.tokens is not None:
                    self.tell(StepReturned(message.step, unpack_i32(message.tokens)))

    def _act(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case ResetAll(message):
                    for name in self.assembly.peers:
                        self.send(COORDINATOR, name, message)
                case Paused() | Resumed():
                    self.tell(action)

    # The daemon's shell and its copy engine

    def tell_daemon(self, event: kv_events.Event) -> None:
        if self.daemon is None:
            return
        for command in self.daemon.handle(event, 0.0):
            match command:
                case kv_events.SendToStage(index, message):
                    self.send(DAEMON, stage_name(index), message)
                case kv_events.SendToCoordinator(message):
                    self.send(DAEMON, COORDINATOR, message)
                case kv_events.MapPool(offer) if self.stages[offer.stage].alive:
                    self.mapped[offer.stage] = self.stages[offer.stage].pool
                    self.tell_daemon(kv_events.PoolMapped(offer))
                case kv_events.StartCopy(index, direction, runs):
                    self._start_copy(index, direction, runs)
        self.daemon.check_invariants()

    def _start_copy(
        self, index: int, direction: Direction, runs: tuple[kv_events.Run, ...]
    ) -> None:
        pool, host = self.mapped[index], self.host[index]
        copy = CopyUnderWay(runs, pool, [])
        for host_block, device_block in _pairs(runs):
            if direction == "load":
                copy.read.append(host[host_block])
                pool[device_block] = TORN
            else:
                copy.read.append(list(pool[device_block]))
                host[host_block] = TORN
        self.copies[index, direction].append(copy)

    def _end_copy(self, index: int, direction: Direction) -> None:
        copy = self.copies[index, direction].popleft()
        host = self.host[index]
        for (host_block, device_block), content in zip(_pairs(copy.runs), copy.read, strict=True):
            if direction == "load":
                assert host[host_block] is content, "a host block changed under a load"
                assert copy.pool[device_block] is TORN, "a block was written during a load into it"
                copy.pool[device_block] = list(content)
            else:
                assert copy.pool[device_block] == content, "a block changed under its store"
                assert host[host_block] is TORN, "a host block was written twice at a time"
                host[host_block] = content
        self.tell_daemon(kv_events.CopyDone(index, direction))
        if self.link_blocks is not None and direction == "load" and self.random.random() < 0.2:
            self._report_links(self.link_blocks)

    def _report_links(self, link_blocks: float) -> None:
        """What the coordinator's shell would make of two reports: the growth since the last."""
        varied = link_blocks * self.random.uniform(0.8, 1.2)
        link = control.LinkTotals(load_bytes=round(1000 * varied * BLOCK_BYTES), load_seconds=1000)
        report = control.KvReport(
            host_blocks_total=self.host_blocks,
            host_blocks_used=0,
            links=(link,) * len(self.stages),
            queued_load_bytes=(),
        )
        self.send(DAEMON, COORDINATOR, report)

    # Stages

    def _stage_reads(self, index: int, message: Message) -> None:
        stage = self.stages[index]
        match message:
            case control.Reset(epoch=epoch) if epoch > stage.epoch:
                stage.epoch, stage.computed = epoch, -1
                stage.plans.clear()
                stage.loaded.clear()
                handle = MemfdHandle(pid=1, fd=1, inode=1, size_bytes=1)
                offer = AttachPool(
                    epoch=epoch,
                    stage=index,
                    handle=handle,
                    num_blocks=self.num_blocks,
                    block_bytes=BLOCK_BYTES,
                )
                self.send(stage_name(index), DAEMON, offer)
            case PoolAttached(epoch=epoch) if epoch == stage.epoch:
                self.send(stage_name(index), COORDINATOR, control.ResetDone(epoch=epoch))
            case Loaded(epoch=epoch, step=step) if epoch == stage.epoch:
                stage.loaded.add(step)
            case StepPlan(epoch=epoch) if epoch == stage.epoch:
                stage.plans.append(message)

    def _may_compute(self, index: int) -> bool:
        stage = self.stages[index]
        plan = stage.plans[0]
        before = self.stages[index - 1] if index else stage
        arrived = not index or (before.epoch == stage.epoch and before.computed >= plan.step)
        return arrived and (not plan.wait_for_load or plan.step in stage.loaded)

    def _compute(self, index: int) -> None:
        stage = self.stages[index]
        plan = stage.plans.popleft()
        assert plan.step > stage.computed
        used = {stage.pool[block] is TORN for block in unpack_i32(plan.block_tables)}
        assert used == {False}, "a step uses a block that is being copied into"
        histories = run_step(plan, stage.pool, self.size)
        stage.computed = plan.step
        tokens = None
        if index == len(self.stages) - 1:
            tokens = pack_i32(
                next_token(histories[row.item], row.banned_token_ids) for row in plan.sample
            )
        name = stage_name(index)
        self.send(name, DAEMON, Computed(epoch=plan.epoch, step=plan.step))
        done = control.StepDone(
            epoch=plan.epoch,
            step=plan.step,
            stage=index,
            compute_s=1.0 + 0.01 * len(histories) + 0.001 * sum(map(len, histories)),
            state_seconds={},
            tokens=tokens,
        )
        self.send(name, COORDINATOR, done)


def _pairs(runs: tuple[kv_events.Run, ...]) -> list[tuple[int, int]]:
    """(host block, device block) of every block copied."""
    return [(h + i, d + i) for h, d, length in runs for i in range(length)]
