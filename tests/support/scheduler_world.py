"""A small world around the scheduling core: stages, a KV daemon and their messages, as plain data.

Blocks really hold content here. A stage reads each item's context out of its own pool through the
plan's block table, and the last stage's next token is a checksum of what it read: KV that was
overwritten, loaded too late or taken from another request changes the output, as in a real model.
What happens next is drawn from a seeded generator among all things that could happen next.
"""

import random
import zlib
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from pipemax.coordinator.core import Scheduler
from pipemax.coordinator.events import (
    BlocksStored,
    Cancelled,
    Command,
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
from pipemax.coordinator.request import NO_STEP, HostState, Request
from pipemax.coordinator.state import SchedulerLimits
from pipemax.proto.messages.control import (
    BlockMove,
    Drop,
    Prefetch,
    Release,
    SampleRow,
    StepPlan,
    Store,
)
from pipemax.proto.messages.ingest import FinishReason, SamplingParams
from pipemax.proto.messages.types import unpack_i32

VOCAB = 60
"""Small, so that end-of-sequence and stop tokens do come up."""
EOS = frozenset({7})
BLOCK_BYTES = 64
SAMPLER = -1
"""Among what may be lost. Nothing goes with it but the steps in flight."""
Block = list[int]


def next_token(history: list[int], banned: Collection[int] = ()) -> int:
    salt = 0
    while (token := zlib.crc32(f"{salt}{history}".encode()) % VOCAB) in banned:
        salt += 1
    return token


def expected_output(
    prompt: list[int], sampling: SamplingParams, max_model_len: int
) -> tuple[list[int], FinishReason]:
    """What a request must bring, by the plainest possible loop."""
    assert sampling.max_tokens is not None
    ends = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else EOS)
    tokens = list(prompt)
    outputs: list[int] = []
    while True:
        banned = ends if len(outputs) < sampling.min_tokens else ()
        outputs.append(next_token(tokens, banned))
        tokens.append(outputs[-1])
        if len(outputs) >= sampling.min_tokens and outputs[-1] in ends:
            return outputs, "stop"
        if len(outputs) == sampling.max_tokens or len(tokens) == max_model_len:
            return outputs, "length"


def run_step(plan: StepPlan, pool: list[Block], block_size: int) -> list[list[int]]:
    """Writes the step's tokens into `pool`; returns each item's whole context, read from there."""
    counts, starts = unpack_i32(plan.num_tokens), unpack_i32(plan.context_lens)
    lengths, flat = unpack_i32(plan.block_counts), unpack_i32(plan.block_tables)
    tokens = unpack_i32(plan.token_ids)
    histories = []
    first_block = first_token = 0
    for count, start, length in zip(counts, starts, lengths, strict=True):
        table = flat[first_block : first_block + length]
        new = tokens[first_token : first_token + count]
        first_block, first_token = first_block + length, first_token + count
        for position, token in enumerate(new, start):
            pool[table[position // block_size]][position % block_size] = token
        histories.append(
            [pool[table[p // block_size]][p % block_size] for p in range(start + count)]
        )
    return histories


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


class RulesKept:
    """What the last stage keeps of requests with SampleRules: all their output tokens."""

    def __init__(self) -> None:
        self.epoch = -1
        self.outputs: dict[int, list[int]] = {}

    def check(self, plan: StepPlan, histories: list[list[int]], sampled: list[int]) -> None:
        """What is kept, with what was sent, is what each row's request has produced so far."""
        if plan.epoch != self.epoch:
            self.epoch, self.outputs = plan.epoch, {}
        for request in plan.ended:
            del self.outputs[request]
        for row, token in zip(plan.sample, sampled, strict=True):
            if row.extras is None or row.extras.request < 0:
                continue
            request, rules = row.extras.request, row.extras.rules
            if rules is not None:
                assert request not in self.outputs
                self.outputs[request] = list(unpack_i32(rules.output_token_ids))
            history = histories[row.item]
            assert self.outputs[request] == history[len(history) - row.position :]
            self.outputs[request].append(token)


class World:
    """`link_blocks`: blocks the link carries in the time of a step, as measurements will say; None
    leaves the prefetch budget unlimited."""

    def __init__(
        self,
        seed: int,
        *,
        stages: int,
        blocks: int,
        host: int,
        block_size: int,
        max_num_seqs: int = 16,
        max_num_batched_tokens: int = 64,
        link_blocks: float | None = None,
        policy: str = DEFAULT_POLICY,
        prefill: str = DEFAULT_PREFILL,
        share_prefixes: bool = False,
    ) -> None:
        self.random = random.Random(seed)
        self.size = block_size
        self.num_blocks = blocks
        self.num_host_blocks = host
        self.link_blocks = link_blocks
        self.max_model_len = (blocks - 1) * block_size
        limits = SchedulerLimits(
            block_size=block_size,
            num_slots=stages,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=self.max_model_len,
            eos_token_ids=EOS,
            share_prefixes=share_prefixes,
        )
        self.prefill = make_prefill(prefill, stages)
        self.scheduler = Scheduler(limits, make_policy(policy), self.prefill)
        self.stages = [Stage([[-1] * block_size for _ in range(blocks)]) for _ in range(stages)]
        self.host: dict[tuple[int, int], list[Block | None]] = {}
        self.inbox: dict[str, deque[Event]] = {"stages": deque(), "daemon": deque()}
        self.finished: dict[int, FinishRequest] = {}
        self.epoch = 0
        self.now = 0.0
        self.events = 0
        self.loaded_blocks = 0
        self.rules_kept = RulesKept()
        self.scored: dict[int, list[int]] = {}
        """Prompt tokens that logprobs came for, by request."""
        self.longest_wait = 0.0
        """Turns a decoding request waited, over what fair shares would make it wait."""
        self.lost: list[int | None] = []
        """Processes not back yet: stages, and None for the daemon."""
        self.lose(stage=None)
        for stage in range(stages):
            self.lose(stage=stage)
        self.come_back()

    # What the coordinator process would do

    def tell(self, event: Event) -> None:
        self.now += 1.0
        self.events += 1
        for command in self.scheduler.handle(event, self.now):
            self._carry_out(command)
        self.scheduler.check_invariants()
        self._check_progress()

    def submit(self, key: int, prompt: list[int], sampling: SamplingParams) -> None:
        self.tell(Submitted(key, prompt, sampling, seed=0))

    def cancel(self, key: int) -> None:
        self.tell(Cancelled(key))

    def lose(self, *, stage: int | None) -> None:
        """A stage (with None the daemon, with SAMPLER a sampler) dies. Nothing is planned until
        `come_back`."""
        if not self.lost:
            self.tell(Paused())
        self.lost.append(stage)
        for one in self.stages:
            one.plans.clear()
            one.jobs.clear()
            one.loads_left.clear()
            one.computed = -1
        for queue in self.inbox.values():  # of the old epoch: the shell drops them
            queue.clear()
        if stage is None:
            self.host.clear()
        elif stage != SAMPLER:
            self.stages[stage].pool = [[-1] * self.size for _ in range(self.num_blocks)]
            self.host = {k: v for k, v in self.host.items() if None not in v}

    def come_back(self) -> None:
        """All that was lost is ready again."""
        lost, self.lost = self.lost, []
        self.epoch += 1
        self.tell(
            Resumed(
                self.epoch,
                self.num_blocks,
                self.num_host_blocks,
                [BLOCK_BYTES] * len(self.stages),
                device_kept=all(stage in (None, SAMPLER) for stage in lost),
                host_kept=None not in lost,
            )
        )

    def _check_progress(self) -> None:
        """The pipeline does not idle, and does not come to rest, while something could run."""
        state = self.scheduler.state
        if state.paused:
            return
        for request in state.running.values():
            fair = len(state.running) + state.limits.num_slots
            if request.num_outputs and not request.in_flight:
                wait = (state.next_step - request.last_turn) / fair
                self.longest_wait = max(self.longest_wait, wait)
            if len(state.in_flight) < state.limits.num_slots:
                assert not self._could_run(request), f"request {request.key} is left to idle"
        if not state.in_flight and (state.running or state.waiting):
            hosts = [state for request in state.running.values() for state in request.host]
            assert state.releasing or HostState.STORING in hosts, "nothing moves any more"

    def _could_run(self, request: Request) -> bool:
        if not request.remaining or not request.is_device_complete:
            return False
        part = self.prefill.part
        if not (part.decodes if request.remaining == 1 else part.prompts):
            return False  # its phase comes
        if request.staged_for != NO_STEP or (request.in_flight and request.remaining == 1):
            return False
        return request.blocks_short(1, self.size) <= self.scheduler.state.blocks.num_free

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
            case ToDaemon(Release(epoch=_, requests=keys, first_indices=firsts)):
                first_of = dict(zip(keys, firsts, strict=True))
                self._forget(lambda k: k[1] >= first_of.get(k[0], k[1] + 1))
                self.inbox["daemon"].append(KvReleased(keys))

    def _forget(self, gone: Callable[[tuple[int, int]], bool]) -> None:
        self.host = {k: v for k, v in self.host.items() if not gone(k)}
        for stage in self.stages:
            for job in [j for j in stage.jobs if gone((j.move.request, j.move.index))]:
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
            event = self.inbox[what].popleft()
            if isinstance(event, StepReturned):
                self._returned(event)
            else:
                self.tell(event)
        return True

    def _may_compute(self, index: int, plan: StepPlan) -> bool:
        arrived = index == 0 or self.stages[index - 1].computed >= plan.step
        loaded = not plan.wait_for_load or self.stages[index].loads_left[plan.step] == 0
        return arrived and loaded

    def _compute(self, index: int) -> None:
        stage = self.stages[index]
        plan = stage.plans.popleft()
        assert plan.step > stage.computed
        histories = run_step(plan, stage.pool, self.size)
        stage.computed = plan.step
        if self.link_blocks is not None:
            compute_s = 1.0 + 0.01 * len(histories) + 0.001 * sum(map(len, histories))
            self._measure(index, plan.step, compute_s, self.link_blocks)
        if index == len(self.stages) - 1:
            sampled = [self._token(histories[row.item], row) for row in plan.sample]
            self.rules_kept.check(plan, histories, sampled)
            self.inbox["stages"].append(StepReturned(plan.step, sampled))

    def _token(self, history: list[int], row: SampleRow) -> int:
        """A row that only scores brings its target; it stands where the history goes on with it."""
        if row.extras is None or row.extras.target < 0:
            return next_token(history, row.banned_token_ids)
        following = [*history, -1][len(history) - row.extras.rows_back]
        assert following in (row.extras.target, -1)
        return row.extras.target

    def _returned(self, event: StepReturned) -> None:
        """As the coordinator's shell: who scores only is told nothing."""
        rows = self.scheduler.rows_of(event.step)
        if not rows.keys:
            self.tell(event)
            return
        assert len(rows.keys) <= self.scheduler.state.limits.max_num_seqs
        tokens = []
        for index, (key, token) in enumerate(zip(rows.keys, event.tokens, strict=True)):
            if index in rows.scored:
                self.scored.setdefault(key, []).append(token)
            else:
                tokens.append(token)
        self.tell(StepReturned(event.step, tokens))

    def _measure(self, stage: int, step: int, compute_s: float, link_blocks: float) -> None:
        self.inbox["stages"].append(StageComputed(stage, step, compute_s))
        if self.random.random() < 0.2:
            num_stages = len(self.stages)
            num_bytes = round(link_blocks * BLOCK_BYTES * 1000)
            measured = LinkMeasured([num_bytes] * num_stages, [1000.0] * num_stages)
            self.inbox["daemon"].append(measured)

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
