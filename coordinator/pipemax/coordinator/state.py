"""The scheduling core's state and the moves that keep its books: who owns which block.

Every device block is free, or in exactly one request's table, or held until the daemon says that
no copy touches it. Host blocks are counted, not placed: placement is the daemon's business.
"""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from pipemax.coordinator.cost_model import PipelineCost, StepFeatures
from pipemax.coordinator.device_blocks import DeviceBlocks
from pipemax.coordinator.events import StageComputed
from pipemax.coordinator.forecast import Forecast
from pipemax.coordinator.link_budget import LinkBudget
from pipemax.coordinator.request import NO_BLOCK, NO_STEP, HostState, Request
from pipemax.coordinator.rosters import Rosters
from pipemax.proto.errors import InvariantError
from pipemax.proto.geometry import blocks_for
from pipemax.proto.messages.control import Release

LATE_SHARE = 0.01
"""Of a step's compute time: a prefetch that a stage waits for longer is counted as late."""


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """What the configuration fixes for the core."""

    block_size: int
    num_slots: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    eos_token_ids: frozenset[int]


class Item(NamedTuple):
    """One request's part in a step."""

    request: Request
    start: int
    num_tokens: int
    samples: bool
    scored: int = 0
    """Tokens whose logits give logprobs of the prompt: the last of those that could."""

    @property
    def end(self) -> int:
        return self.start + self.num_tokens

    @property
    def last_target(self) -> int:
        """Where the last prompt token stands whose logprobs the item gives."""
        return min(self.end, self.request.num_prompt - 1)


class StepInFlight:
    """A planned step, and sums over its items that are asked for more than once."""

    def __init__(self, slot: int, items: list[Item]) -> None:
        self.slot = slot
        self.items = items
        self.num_samples = sum(item.samples for item in items)
        self.sampled_context = sum(item.start for item in items if item.samples)
        self.features = features_of(items)
        """What the step's time depends on."""


def features_of(items: Iterable[Item]) -> StepFeatures:
    """What the time of a step with these items depends on."""
    decodes = context = prefill = pairs = 0
    for item in items:
        if item.num_tokens == 1:
            decodes += 1
            context += item.end
        else:
            prefill += item.num_tokens
            pairs += item.num_tokens * item.start + item.num_tokens * (item.num_tokens + 1) // 2
    return StepFeatures(decodes, context, prefill, pairs)


@dataclass(slots=True)
class Releasing:
    """KV of a finished or preempted request that the daemon has not confirmed free."""

    host_blocks: int
    device_blocks: list[int]
    ready_after: int


@dataclass(slots=True)
class Counters:
    """Monotonic totals, in requests, steps and tokens."""

    finished: int = 0
    preemptions: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    context_tokens: int = 0
    prefetched_tokens: int = 0
    decode_context_tokens: int = 0
    decode_prefetched_tokens: int = 0
    recomputed_tokens: int = 0
    prefetch_budget_blocks: int = 0
    """Allowed to the prefetches ordered: the link's budget, or all there was to load if less."""
    prefetch_blocks: int = 0
    """Of those, ordered."""
    late_prefetches: int = 0
    """Times that a stage waited for a step's prefetch."""


@dataclass(slots=True)
class SchedulerState:
    limits: SchedulerLimits
    epoch: int = 0
    paused: bool = True
    next_step: int = 0
    next_kv_key: int = 1
    num_host_blocks: int = 0
    host_used: int = 0
    blocks: DeviceBlocks = field(default_factory=lambda: DeviceBlocks(0))
    budget: LinkBudget = field(default_factory=lambda: LinkBudget(()))
    costs: PipelineCost = field(default_factory=lambda: PipelineCost(0))
    """Outlives epochs: the stages stay the same."""
    waiting: OrderedDict[int, Request] = field(default_factory=OrderedDict)
    """By key, in order of service."""
    running: dict[int, Request] = field(default_factory=dict)
    """By key, in order of admission."""
    by_kv_key: dict[int, Request] = field(default_factory=dict)
    in_flight: dict[int, StepInFlight] = field(default_factory=dict)
    releasing: dict[int, Releasing] = field(default_factory=dict)
    staged_step: int = NO_STEP
    """Step that a prefetch was ordered for and that is not planned yet; NO_STEP for none."""
    ended_rules: list[int] = field(default_factory=list)
    """Keys of requests that ended, and whose SampleRules the last stage still keeps."""
    counters: Counters = field(default_factory=Counters)
    forecast: Forecast = field(init=False)
    rosters: Rosters = field(default_factory=Rosters)
    total_blocks: int = 0
    """Blocks of running requests, each counted once wherever it lives."""
    num_storing: int = 0
    """Blocks of running requests that are being stored."""

    def __post_init__(self) -> None:
        self.forecast = Forecast(self.limits.block_size)

    def stage_computed(self, event: StageComputed) -> None:
        """Learn from a stage's time for a step in flight."""
        stage, step, compute_s = event.stage, event.step, event.compute_s
        self.budget.step_measured(stage, step, compute_s)
        if event.wait_kv_s > LATE_SHARE * compute_s:
            self.counters.late_prefetches += 1
        flight = self.in_flight.get(step)
        if flight is not None:
            self.costs.observe(stage, flight.features, compute_s)

    def admit(self, request: Request, now: float) -> None:
        request.forget_kv(self.next_kv_key)
        self.next_kv_key += 1
        if request.admitted_at is None:
            request.admitted_at = now
            # Queues up behind those that run: a stream of newcomers must not keep them waiting.
            request.last_turn = self.next_step - 1
        self.running[request.key] = request
        self.by_kv_key[request.kv_key] = request
        self.forecast.add(request)
        self.rosters.place(request)

    def extend_table(self, request: Request, blocks: list[int]) -> None:
        """Give a running request `blocks` behind those it has."""
        request.table.extend(blocks)
        request.host.extend([HostState.NONE] * len(blocks))
        self.total_blocks += len(blocks)

    def put_first(self, request: Request) -> None:
        """Queue up a request that ran before, ahead of all that wait."""
        self.waiting[request.key] = request
        self.waiting.move_to_end(request.key, last=False)

    def stop_running(self, request: Request) -> None:
        """Strike a request from the books of those that run; its blocks are the caller's."""
        del self.running[request.key]
        del self.by_kv_key[request.kv_key]
        self.forecast.remove(request)
        self.rosters.remove(request)
        self.total_blocks -= len(request.table)
        self.num_storing -= request.host.count(HostState.STORING)

    def forget_kv(self, request: Request) -> Release | None:
        """Take a running request's KV away. Returns what the daemon must be told, None when it
        holds nothing; blocks that a copy may still touch are held until it has answered."""
        touched: list[int] = []
        free: list[int] = []
        staged = request.staged_for != NO_STEP
        for block, state in zip(request.table, request.host, strict=True):
            if block != NO_BLOCK:
                held = state == HostState.STORING or (staged and state == HostState.STORED)
                (touched if held else free).append(block)
        on_host = len(request.host) - request.host.count(HostState.NONE)
        self.blocks.release(free, request.last_step)
        self.stop_running(request)
        if not on_host:
            return None
        self.releasing[request.kv_key] = Releasing(on_host, touched, request.last_step)
        return Release(epoch=self.epoch, requests=(request.kv_key,))

    def released(self, kv_key: int) -> None:
        """The daemon confirmed; unknown keys belong to an epoch that ended."""
        entry = self.releasing.pop(kv_key, None)
        if entry is not None:
            self.host_used -= entry.host_blocks
            self.blocks.release(entry.device_blocks, entry.ready_after)

    def evict(self, request: Request) -> int:
        """Forget the device copies of what the host holds, now and as further blocks get stored.
        Returns how many blocks that freed."""
        request.evicting = True
        stored = HostState.STORED
        freed = [
            index
            for index, (block, state) in enumerate(zip(request.table, request.host, strict=True))
            if state == stored and block != NO_BLOCK
        ]
        if freed:
            self._free_indices(request, freed)
        return len(freed)

    def block_stored(self, kv_key: int, index: int) -> None:
        request = self.by_kv_key.get(kv_key)
        if request is None:
            return
        request.host[index] = HostState.STORED
        self.num_storing -= 1
        if request.evicting and request.staged_for == NO_STEP:
            self._free_indices(request, [index])

    def load_into(
        self, request: Request, blocks: Iterable[int], step: int, after: int
    ) -> list[int]:
        """Assign `blocks`, which step `after` still uses, to the indices the device lacks, in
        order; returns those indices."""
        table = request.table
        indices = [index for index, block in enumerate(table) if block == NO_BLOCK]
        for index, block in zip(indices, blocks, strict=True):
            table[index] = block
        request.num_missing = 0
        request.evicting = False
        request.staged_for = step
        # If the request ends before `step`, its blocks must not be taken for unused.
        request.last_step = max(request.last_step, after)
        request.load_step = step
        request.loading = indices
        self.rosters.place(request)
        return indices

    @property
    def held_tokens(self) -> int:
        """Tokens that all blocks hold, the host's included."""
        return (self.blocks.num_blocks + self.num_host_blocks) * self.limits.block_size

    @property
    def growth_reserve(self) -> int:
        """Blocks kept free for requests whose KV is on the device, in their next rounds: one in
        `block_size` of them needs one each round, if they are at different places."""
        whole = len(self.running) - self.rosters.num_incomplete
        return min(whole, self.limits.num_slots + -(-2 * whole // self.limits.block_size))

    def check_invariants(self) -> None:
        """Raises InvariantError when the books contradict themselves."""
        self.blocks.check()
        owned = self.blocks.free_blocks()
        owned += [b for entry in self.releasing.values() for b in entry.device_blocks]
        for request in self.running.values():
            owned += [b for b in request.table if b != NO_BLOCK]
            self._check_request(request)
        if sorted(owned) != list(range(self.blocks.num_blocks)):
            raise InvariantError("device blocks are lost or owned twice")
        on_host = sum(
            len(request.host) - request.host.count(HostState.NONE)
            for request in self.running.values()
        )
        if on_host + sum(e.host_blocks for e in self.releasing.values()) != self.host_used:
            raise InvariantError("host blocks are miscounted")
        if self.host_used > self.num_host_blocks:
            raise InvariantError("more host blocks in use than there are")
        self._check_sums()
        keys = [*self.waiting, *self.running]
        if len(set(keys)) != len(keys):
            raise InvariantError("a request is both waiting and running")
        slots = [step.slot for step in self.in_flight.values()]
        if len(set(slots)) != len(slots) or len(slots) > self.limits.num_slots:
            raise InvariantError("two steps in flight share a slot")

    def _check_sums(self) -> None:
        running = self.running.values()
        self.rosters.check(self.running)
        if self.total_blocks != sum(len(r.table) for r in running):
            raise InvariantError("blocks of running requests are miscounted")
        if self.num_storing != sum(r.host.count(HostState.STORING) for r in running):
            raise InvariantError("blocks being stored are miscounted")
        if not self.forecast.check(self.running):
            raise InvariantError("the forecast is out of date")

    def _check_request(self, request: Request) -> None:
        size = self.limits.block_size
        if not request.computed <= request.planned <= len(request.tokens):
            raise InvariantError(f"request {request.key}: lengths out of order")
        if len(request.table) != len(request.host) or request.num_missing != request.table.count(
            NO_BLOCK
        ):
            raise InvariantError(f"request {request.key}: block table miscounted")
        if len(request.table) < blocks_for(request.planned, size):
            raise InvariantError(f"request {request.key}: tokens without a block")
        for index, (block, state) in enumerate(zip(request.table, request.host, strict=True)):
            if block == NO_BLOCK and state != HostState.STORED:
                raise InvariantError(f"request {request.key}: block {index} is nowhere")
            if state != HostState.NONE and (index + 1) * size > request.planned:
                raise InvariantError(f"request {request.key}: block {index} stored unfilled")
        flights = sum(
            item.request is request for step in self.in_flight.values() for item in step.items
        )
        if flights != request.in_flight:
            raise InvariantError(f"request {request.key}: steps in flight miscounted")

    def _free_indices(self, request: Request, indices: Iterable[int]) -> None:
        freed = []
        for index in indices:
            freed.append(request.table[index])
            request.table[index] = NO_BLOCK
        request.num_missing += len(freed)
        self.rosters.place(request)
        self.blocks.release(freed, request.last_step)
