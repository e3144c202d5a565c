"""The scheduling core's state and the moves that keep its books: who owns which block.

Every device block is free, or in exactly one request's table, or held until the daemon says that
no copy touches it. Host blocks are counted, not placed: placement is the daemon's business.
"""

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from pipemax.coordinator import sharing
from pipemax.coordinator.cost_model import PipelineCost, StepFeatures
from pipemax.coordinator.device_blocks import DeviceBlocks
from pipemax.coordinator.events import StageComputed
from pipemax.coordinator.forecast import Forecast
from pipemax.coordinator.link_budget import LinkBudget
from pipemax.coordinator.prefixes import PrefixTree, SharedBlock
from pipemax.coordinator.releasing import Releasing, merge_into, release_of
from pipemax.coordinator.request import NO_BLOCK, NO_STEP, HostState, Request
from pipemax.coordinator.rosters import Rosters
from pipemax.coordinator.waiting import WaitingQueue
from pipemax.proto.messages.control import BlockMove, Release

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
    share_prefixes: bool = False
    """Prompts that begin alike share their full blocks."""


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


class Decodes(NamedTuple):
    """Requests next to each other in a step that each decode a token, and nothing else: no block is
    loaded for them or shared in what they fill. Columns, as there are hundreds in every step."""

    requests: list[Request]
    starts: list[int]
    """Tokens that each has in the KV cache."""
    tables: "list[array[int]]"
    """Their block tables, all blocks of which the step reads or fills."""

    @property
    def items(self) -> list[Item]:
        pairs = zip(self.requests, self.starts, strict=True)
        return [Item(request, start, 1, samples=True) for request, start in pairs]


Part = Item | Decodes
"""Of a step."""


def num_items(parts: Iterable[Part]) -> int:
    return sum([len(part.requests) if isinstance(part, Decodes) else 1 for part in parts])


class StepInFlight:
    """A planned step, and sums over its items that are asked for more than once."""

    def __init__(self, slot: int, parts: Sequence[Part]) -> None:
        self.slot = slot
        self.parts = parts
        """Its items in order."""
        self.num_samples = self.sampled_context = 0
        for part in parts:
            if isinstance(part, Decodes):
                self.num_samples += len(part.requests)
                self.sampled_context += sum(part.starts)
            elif part.samples:
                self.num_samples += 1
                self.sampled_context += part.start
        self.features = features_of(parts)
        """What the step's time depends on."""

    @property
    def items(self) -> list[Item]:
        """One by one."""
        return [
            item
            for part in self.parts
            for item in (part.items if isinstance(part, Decodes) else (part,))
        ]

    @property
    def num_items(self) -> int:
        return num_items(self.parts)


def features_of(parts: Iterable[Part]) -> StepFeatures:
    """What the time of a step of these depends on."""
    decodes = context = prefill = pairs = 0
    for part in parts:
        if isinstance(part, Decodes):
            decodes += len(part.requests)
            context += sum(part.starts) + len(part.requests)
        elif part.num_tokens == 1:
            decodes += 1
            context += part.end
        else:
            prefill += part.num_tokens
            pairs += part.num_tokens * part.start + part.num_tokens * (part.num_tokens + 1) // 2
    return StepFeatures(decodes, context, prefill, pairs)


@dataclass(slots=True)
class Counters:
    """Monotonic totals, in requests, steps and tokens."""

    finished: int = 0
    preemptions: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    prefix_query_tokens: int = 0
    """Prompt tokens of requests that might share their first blocks with others."""
    prefix_hit_tokens: int = 0
    """Of those, tokens that another request had computed. Part of `prompt_tokens` too."""
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
    waiting: WaitingQueue = field(init=False)
    running: dict[int, Request] = field(default_factory=dict)
    """By key, in order of admission."""
    by_kv_key: dict[int, Request] = field(default_factory=dict)
    prefixes: PrefixTree = field(init=False)
    staged_shared: list[SharedBlock] = field(default_factory=list)
    """Blocks of `prefixes` that are prefetched for `staged_step`."""
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
    """Blocks of running requests, each counted once wherever it lives and whoever shares it."""
    num_storing: int = 0
    """Blocks of running requests that are being stored."""
    _match: tuple[tuple[int, int], list[SharedBlock]] = field(default=((-1, -1), []), init=False)
    """The last answer of `prefix_of`, and to what."""

    def __post_init__(self) -> None:
        self.waiting = WaitingQueue(self.limits.max_model_len, self.limits.eos_token_ids)
        self.forecast = Forecast(self.limits.block_size)
        self.prefixes = PrefixTree(self.limits.block_size)

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

    def stop_running(self, request: Request) -> None:
        """Strike a request from the books of those that run; its blocks are the caller's."""
        del self.running[request.key]
        del self.by_kv_key[request.kv_key]
        self.forecast.remove(request)
        self.rosters.remove(request)
        own = len(request.shared)
        self.total_blocks -= len(request.table) - own
        self.num_storing -= request.host.count(HostState.STORING, own)

    def forget_kv(self, request: Request) -> Release | None:
        """Take a running request's KV away, but for what others use too. Returns what the daemon
        must be told, None when it holds nothing of it; blocks that a copy may still touch are held
        until it has answered."""
        touched: list[int] = []
        free: list[int] = []
        staged = request.staged_for != NO_STEP
        own = len(request.shared)
        for block, state in zip(request.table[own:], request.host[own:], strict=True):
            if block != NO_BLOCK:
                held = state == HostState.STORING or (staged and state == HostState.STORED)
                (touched if held else free).append(block)
        on_host = len(request.host) - own - request.host.count(HostState.NONE, own)
        self.blocks.release(free, request.last_step)
        self.stop_running(request)
        ended = sharing.leave(self, request)
        if on_host:
            merge_into(ended, request.kv_key, Releasing(on_host, touched, request.last_step, own))
        if not ended:
            return None
        for kv_key, entry in ended.items():
            before = self.releasing.setdefault(kv_key, entry)
            if before is not entry:
                before.add(entry)
                before.answers += 1
        return release_of(self.epoch, ended)

    def released(self, kv_key: int) -> None:
        """The daemon confirmed; unknown keys belong to an epoch that ended."""
        entry = self.releasing.get(kv_key)
        if entry is None:
            return
        entry.answers -= 1
        if not entry.answers:
            del self.releasing[kv_key]
            self.host_used -= entry.host_blocks
            self.blocks.release(entry.device_blocks, entry.ready_after)

    def evict(self, request: Request) -> int:
        """Forget the device copies of what the host holds, now and as further blocks get stored.
        Returns how many blocks that freed."""
        request.evicting = True
        stored = HostState.STORED
        indices = [
            index
            for index, (block, state) in enumerate(zip(request.table, request.host, strict=True))
            if state == stored and block != NO_BLOCK
        ]
        return self._free_indices(request, indices)

    def block_stored(self, kv_key: int, index: int) -> None:
        """The daemon has the block; what is unknown has ended meanwhile."""
        shared = self.prefixes.find(kv_key, index)
        if shared is not None:
            shared.host = HostState.STORED
            self.num_storing -= 1
            for user in list(self.prefixes.users(shared)):
                self._stored_for(user, index)
            return
        request = self.by_kv_key.get(kv_key)
        if request is not None:
            self.num_storing -= 1
            self._stored_for(request, index)

    def _stored_for(self, request: Request, index: int) -> None:
        request.host[index] = HostState.STORED
        if request.evicting and request.staged_for == NO_STEP:
            self._free_indices(request, [index])

    def load_into(
        self, request: Request, blocks: Iterable[int], step: int, after: int
    ) -> list[BlockMove]:
        """Assign `blocks`, which step `after` still uses, to the indices the device lacks, in
        order; returns what has to be copied."""
        table, shared = request.table, request.shared
        indices = [index for index, block in enumerate(table) if block == NO_BLOCK]
        moves: list[BlockMove] = []
        for index, block in zip(indices, blocks, strict=True):
            table[index] = block
            kv_key = request.kv_key
            if index < len(shared):
                kv_key = sharing.loaded(self, shared[index], block, step, after)
            moves.append(BlockMove(kv_key, index, block))
        request.num_missing = 0
        request.evicting = False
        request.staged_for = step
        # If the request ends before `step`, its blocks must not be taken for unused.
        request.last_step = max(request.last_step, after)
        request.load_step = step
        request.loading = indices
        self.rosters.place(request)
        return moves

    def expected_peak(self, newcomer: Request | None = None) -> float:
        """Blocks that those who run, and the newcomer, are forecast to need at their worst moment;
        what is shared counts once."""
        peak = self.forecast.peak_blocks(newcomer) - self.prefixes.num_saved
        if newcomer is not None:
            peak -= len(self.prefix_of(newcomer))
        return max(0.0, peak)

    def prefix_of(self, request: Request) -> list[SharedBlock]:
        """Blocks that a request which does not run yet would share."""
        size = self.limits.block_size
        if not self.limits.share_prefixes or request.num_prompt <= size:
            return []
        question = (request.key, self.prefixes.version)
        if self._match[0] != question:
            self._match = (question, self.prefixes.match(request))
        return self._match[1]

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

    def _free_indices(self, request: Request, indices: Sequence[int]) -> int:
        """Returns how many blocks are free now."""
        if not indices:
            return 0
        freed = []
        table, own = request.table, len(request.shared)
        num_shared = 0
        for index in indices:
            if index >= own:
                freed.append(table[index])
            elif sharing.is_kept(self, request.shared[index]):
                continue
            else:
                num_shared += sharing.give_up(self, request, index)
            table[index] = NO_BLOCK
            request.num_missing += 1
        self.rosters.place(request)
        self.blocks.release(freed, request.last_step)
        return len(freed) + num_shared
