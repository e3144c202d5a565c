"""A small world around the scheduling core: stages, a KV daemon and their messages, as plain data.

Blocks really hold content here. A stage reads each item's context out of its own pool through the
plan's block table, and the last stage's next token is a checksum of what it read: KV that was
overwritten, loaded too late or taken from another request changes the output, as in a real model.
What happens next is drawn from a seeded generator among all things that could happen next.
"""

import random
import zlib
from collections import deque
from dataclasses import dataclass, field

from pipemax.coordinator.core import Scheduler
from pipemax.coordinator.events import (
    BlocksStored,
    Cancelled,
    Command,
    Event,
    FinishRequest,
    KvReleased,
    Paused,
    Resumed,
    StepReturned,
    Submitted,
    ToDaemon,
    ToStages,
)
from pipemax.coordinator.state import SchedulerLimits
from pipemax.proto.messages.control import BlockMove, Drop, Prefetch, Release, StepPlan, Store
from pipemax.proto.messages.ingest import SamplingParams
from pipemax.proto.messages.types import unpack_i32

VOCAB = 50_000
Block = list[int]


def next_token(history: list[int]) -> int:
    return zlib.crc32(str(history).encode()) % VOCAB


def expected_output(prompt: list[int], max_tokens: int, eos: frozenset[int]) -> list[int]:
    tokens = list(prompt)
    while len(tokens) < len(prompt) + max_tokens:
        tokens.append(next_token(tokens))
        if tokens[-1] in eos:
            break
    return tokens[len(prompt) :]


@dataclass
class Job:
    """One block to copy on one stage."""

    kind: str
    after: int
    step: int
    move: BlockMove


@dataclass
class Stage:
    pool: list[Block]
    plans: deque[StepPlan] = field(default_factory=deque)
    computed: int = -1
    jobs: list[Job] = field(default_factory=list)
    loads_left: dict[int, int] = field(default_factory=dict)


class World:
    def __init__(self, seed: int, *, stages: int, blocks: int, host: int, block_size: int) -> None:
        self.random = random.Random(seed)
        self.size = block_size
        self.num_blocks = blocks
        self.num_host_blocks = host
        limits = SchedulerLimits(
            block_size=block_size,
            num_slots=stages,
            max_num_seqs=16,
            max_num_batched_tokens=64,
            max_model_len=(blocks - 1) * block_size,
            eos_token_ids=frozenset({7}),
        )
        self.scheduler = Scheduler(limits)
        self.stages = [Stage([[-1] * block_size for _ in range(blocks)]) for _ in range(stages)]
        self.host: dict[tuple[int, int], list[Block | None]] = {}
        self.inbox: dict[str, deque[Event]] = {"stages": deque(), "daemon": deque()}
        self.samples: dict[int, list[tuple[int, int]]] = {}
        self.finished: dict[int, FinishRequest] = {}
        self.epoch = 0
        self.now = 0.0
        self.loaded_blocks = 0
        self.max_idle_turns = 0
        self.resume(device_kept=False, host_kept=False)

    # What the coordinator process would do

    def tell(self, event: Event) -> None:
        self.now += 1.0
        for command in self.scheduler.handle(event, self.now):
            self._carry_out(command)
        self.scheduler.check_invariants()

    def submit(self, key: int, prompt: list[int], max_tokens: int) -> None:
        sampling = SamplingParams(max_tokens=max_tokens)
        self.tell(Submitted(key, prompt, sampling, seed=0))

    def cancel(self, key: int) -> None:
        self.tell(Cancelled(key))

    def lose(self, *, stage: int | None) -> None:
        """A stage (or, with None, the daemon) dies and comes back."""
        self.tell(Paused())
        for one in self.stages:
            one.plans.clear()
            one.jobs.clear()
            one.loads_left.clear()
            one.computed = -1
        for queue in self.inbox.values():
            if self.random.random() < 0.5:  # of the old epoch: the shell drops them
                queue.clear()
        self.inbox["stages"].clear()
        self.inbox["daemon"].clear()
        if stage is None:
            self.host.clear()
        else:
            self.stages[stage].pool = [[-1] * self.size for _ in range(self.num_blocks)]
            self.host = {k: v for k, v in self.host.items() if None not in v}
        self.resume(device_kept=stage is None, host_kept=stage is not None)

    def resume(self, *, device_kept: bool, host_kept: bool) -> None:
        self.epoch += 1
        self.tell(
            Resumed(
                self.epoch,
                self.num_blocks,
                self.num_host_blocks,
                [64] * len(self.stages),
                device_kept=device_kept,
                host_kept=host_kept,
            )
        )

    def _carry_out(self, command: Command) -> None:
        match command:
            case ToStages(plan):
                assert plan.epoch == self.epoch
                for stage in self.stages:
                    stage.plans.append(plan)
            case FinishRequest():
                assert command.key not in self.finished, "a request finished twice"
                self.finished[command.key] = command
            case ToDaemon(Prefetch() as message):
                self._order_loads(message)
            case ToDaemon(Store() as message):
                self._order_stores(message)
            case ToDaemon(Drop(epoch=_, request=key, first_index=first)):
                self._forget(lambda k: k[0] == key and k[1] >= first)
            case ToDaemon(Release(epoch=_, requests=keys)):
                self._forget(lambda k: k[0] in keys)
                self.inbox["daemon"].append(KvReleased(keys))

    def _forget(self, gone: object) -> None:
        test = gone
        assert callable(test)
        self.host = {k: v for k, v in self.host.items() if not test(k)}
        for stage in self.stages:
            for job in [j for j in stage.jobs if test((j.move.request, j.move.index))]:
                stage.jobs.remove(job)
                if job.kind == "load":
                    stage.loads_left[job.step] -= 1

    def _order_loads(self, message: Prefetch) -> None:
        assert message.blocks
        self.loaded_blocks += len(message.blocks)
        for move in message.blocks:
            assert None not in self.host[move.request, move.index], "prefetch of an unstored block"
        for stage in self.stages:
            assert message.step not in stage.loads_left, "two prefetches for one step"
            stage.loads_left[message.step] = len(message.blocks)
            stage.jobs += [Job("load", message.after, message.step, m) for m in message.blocks]

    def _order_stores(self, message: Store) -> None:
        for move in message.blocks:
            assert (move.request, move.index) not in self.host, "a block is stored twice"
            self.host[move.request, move.index] = [None] * len(self.stages)
            assert len(self.host) <= self.num_host_blocks
        for stage in self.stages:
            stage.jobs += [Job("store", message.after, -1, m) for m in message.blocks]

    # What happens by itself

    def step(self) -> bool:
        """One thing happens; False when nothing can."""
        possible: list[tuple[str, int]] = []
        for index, stage in enumerate(self.stages):
            if stage.plans and self._may_compute(index, stage.plans[0]):
                possible += [("compute", index)] * 2
            if any(job.after <= stage.computed for job in stage.jobs):
                possible += [("copy", index)] * 4
        possible += [(name, 0) for name, queue in self.inbox.items() if queue]
        if not possible:
            return False
        what, index = self.random.choice(possible)
        if what == "compute":
            self._compute(index)
        elif what == "copy":
            stage = self.stages[index]
            self._copy(
                index,
                self.random.choice([job for job in stage.jobs if job.after <= stage.computed]),
            )
        else:
            self.tell(self.inbox[what].popleft())
        return True

    def _may_compute(self, index: int, plan: StepPlan) -> bool:
        arrived = index == 0 or self.stages[index - 1].computed >= plan.step
        loaded = not plan.wait_for_load or self.stages[index].loads_left[plan.step] == 0
        return arrived and loaded

    def _compute(self, index: int) -> None:
        stage = self.stages[index]
        plan = stage.plans.popleft()
        assert plan.step > stage.computed
        counts, starts = unpack_i32(plan.num_tokens), unpack_i32(plan.context_lens)
        lengths, flat = unpack_i32(plan.block_counts), unpack_i32(plan.block_tables)
        tokens = unpack_i32(plan.token_ids)
        histories = []
        first_block = first_token = 0
        for count, start, length in zip(counts, starts, lengths, strict=True):
            table = flat[first_block : first_block + length]
            new = tokens[first_token : first_token + count]
            first_block, first_token = first_block + length, first_token + count
            for offset, token in enumerate(new):
                position = start + offset
                stage.pool[table[position // self.size]][position % self.size] = token
            histories.append(
                [stage.pool[table[p // self.size]][p % self.size] for p in range(start + count)]
            )
        stage.computed = plan.step
        if index == len(self.stages) - 1:
            sampled = [next_token(histories[row.item]) for row in plan.sample]
            self.inbox["stages"].append(StepReturned(plan.step, sampled))

    def _copy(self, index: int, job: Job) -> None:
        stage = self.stages[index]
        stage.jobs.remove(job)
        key = (job.move.request, job.move.index)
        if job.kind == "load":
            content = self.host[key][index]
            assert content is not None
            stage.pool[job.move.device_block] = list(content)
            stage.loads_left[job.step] -= 1
            return
        self.host[key][index] = list(stage.pool[job.move.device_block])
        if None not in self.host[key]:
            self.inbox["daemon"].append(BlocksStored([key[0]], [key[1]]))
