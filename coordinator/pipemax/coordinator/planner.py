"""Plans steps and prefetches over the scheduler's state.

The order of work, for each free slot: admit what fits, compose the step (prefetched requests
first, then device-resident ones up to the slot's even share, then prompt chunks in what is left of
the token budget), order the stores of the blocks it fills, then look one turn ahead: order the
prefetch of the next step, and evict after this step what the one after that needs room for.
"""

from collections.abc import Iterable, Sequence
from operator import attrgetter

from pipemax.coordinator import sharing
from pipemax.coordinator.admission import Admission
from pipemax.coordinator.cost_model import StepFeatures
from pipemax.coordinator.events import Command, ToDaemon, ToStages
from pipemax.coordinator.phases import MIXED, Prefill, Prospect
from pipemax.coordinator.plan_message import build_step_plan
from pipemax.coordinator.policy import Candidate, Outlook, SelectionPolicy, SlotTarget
from pipemax.coordinator.preemption import Preemption
from pipemax.coordinator.prefill_pacing import NO_ARRIVALS, Arrivals, EvenChunk
from pipemax.coordinator.prospect import prospect_of
from pipemax.coordinator.request import NO_STEP, HostState, Request
from pipemax.coordinator.rosters import candidate_of
from pipemax.coordinator.state import Item, SchedulerState, StepInFlight, features_of
from pipemax.proto.errors import InvariantError
from pipemax.proto.messages.control import BlockMove, Prefetch, Store

STAGING_SHARE = 0.5
"""Most of the device pool that one step's prefetch may take. Two prefetches are alive at a time
(one being read, one being loaded), so more than half could never be used."""
OFFLOAD_PRESSURE = 0.9
"""Write-through starts when the expected need exceeds this share of the device pool."""
_LOAD_BLOCKS = attrgetter("load_blocks")


class Planner:
    def __init__(self, state: SchedulerState, policy: SelectionPolicy, prefill: Prefill) -> None:
        self._state = state
        self._policy = policy
        self._prefill = prefill
        self._preemption = Preemption(state)
        self._admission = Admission(state, policy, prefill)
        self._even_chunk = EvenChunk(state.limits.num_slots)
        self._rows_left = 0
        """Rows of logits that the step being composed may still have; stages have room for as many
        as requests."""
        self._commands: list[Command] = []
        self._declined: tuple[int, int, int, int] | None = None
        """What the policy was asked when it last chose nobody: it would do so again."""

    def pump(self, now: float) -> list[Command]:
        """Plan whatever can be planned now."""
        state = self._state
        self._commands = []
        if state.paused:
            return []
        while True:
            while len(state.in_flight) < state.limits.num_slots and self._plan_step(now):
                pass
            self._plan_prefetch(latest=state.next_step - 2)
            released = self._preemption.free_blocks()
            if released is None:
                return self._commands
            self._commands += released

    # One step

    def _plan_step(self, now: float) -> bool:
        state = self._state
        self._skip_orphaned_staging()
        self._prefill.begin(state.next_step, self._prospect)
        items = self._find_items(now)
        for _ in range(2):  # who was just admitted may already lack one token only
            if items or not self._prefill.turn(is_idle=not state.in_flight):
                break
            items = self._find_items(now)
        if not items:
            return False
        step = state.next_step
        slot = self._free_slot()
        for item in items:
            self._account(item, step)
        plan = build_step_plan(
            items,
            epoch=state.epoch,
            step=step,
            slot=slot,
            wait_for_load=state.staged_step == step,
            block_size=state.limits.block_size,
            eos_token_ids=state.limits.eos_token_ids,
            ended=state.ended_rules,
        )
        if plan.ended:
            state.ended_rules.clear()
        self._commands.append(ToStages(plan))
        flight = state.in_flight[step] = StepInFlight(slot, items)
        self._prefill.planned(flight.features.prefill_tokens, state.held_tokens)
        state.next_step += 1
        state.counters.steps += 1
        state.budget.step_planned(step, state.costs.predict(flight.features))
        self._close_staging()
        self._store(items, step)
        self._plan_prefetch(latest=step - 1)
        self._make_room(items)
        return True

    def _find_items(self, now: float) -> list[Item]:
        """Of those who may take part now; none when none of them can."""
        state = self._state
        if self._prefill.part.prompts:
            self._admission.admit(now)
            while not self._prefill.part.decodes and self._displace():
                self._admission.admit(now)
        items = self._compose()
        if not items and not state.in_flight:
            self._skip_orphaned_staging(forced=True)
        if not items and state.staged_step == NO_STEP:
            # Nothing on the device can run: order a prefetch although this step will wait for it.
            self._plan_prefetch(latest=state.next_step - 1, urgent=True)
            items = self._compose()
        return items

    def _compose(self) -> list[Item]:
        """The items of the next step; allocates the blocks they fill."""
        state = self._state
        staged = [r for r in state.rosters.staged.values() if self._may_take_part(r)]
        target = self._slot_target()
        keys = self._policy.choose_residents(
            self._residents(), [candidate_of(r) for r in staged], target
        )
        items: list[Item] = []
        tokens = 0
        limits = state.limits
        self._rows_left = limits.max_num_seqs
        for request in [*staged, *(state.running[key] for key in keys)]:
            if len(items) < limits.max_num_seqs and tokens < limits.max_num_batched_tokens:
                tokens += self._add(items, request, limits.max_num_batched_tokens - tokens)
        chunk = self._prefill_chunk(items, target, limits.max_num_batched_tokens - tokens)
        for request in list(state.rosters.prefilling.values()):
            if chunk <= 0 or len(items) >= limits.max_num_seqs:
                break
            chunk -= self._add(items, request, chunk)
        return items

    def _residents(self) -> list[Candidate]:
        """Device-resident requests that can take their turn: each finds a block if it needs one."""
        state = self._state
        if not self._prefill.part.decodes:
            return []
        residents = list(state.rosters.resident.values())
        free = state.blocks.num_free
        if free:
            return residents
        size = state.limits.block_size
        return [c for c in residents if not state.running[c.key].blocks_short(1, size)]

    def _add(self, items: list[Item], request: Request, most_tokens: int) -> int:
        """Adds up to `most_tokens` of the request, as far as there are blocks for them; returns
        how many."""
        blocks, size = self._state.blocks, self._state.limits.block_size
        if request.planned < len(request.shared) * size:
            sharing.skip_ready(self._state, request)
        planned = request.planned
        remaining = len(request.tokens) - planned
        held = len(request.table) * size
        if remaining == 1 and planned < held and self._rows_left:
            self._rows_left -= 1
            items.append(Item(request, planned, 1, samples=True))
            return 1
        room = held + blocks.num_free * size - planned
        count = self._within_rows(request, min(remaining, most_tokens, room))
        if count > 0 and planned < len(request.shared) * size:
            count = sharing.tokens_to_fill(self._state, request, count)
        if count <= 0:
            return 0
        sharing.claim(self._state, request, count)
        short = request.blocks_short(count, size)
        if short:
            taken = blocks.take_for_write(short)
            if taken is None:
                raise InvariantError("free device blocks are miscounted")
            self._state.extend_table(request, taken)
        scored = request.rows_to_score(count)
        item = Item(request, planned, count, samples=count == remaining, scored=scored)
        self._rows_left -= item.scored + item.samples
        items.append(item)
        return count

    def _within_rows(self, request: Request, count: int) -> int:
        """Of the request's next `count` tokens, as many as there are rows of logits for."""
        excess = request.rows_to_score(count) - self._rows_left
        count -= max(0, excess)
        samples = count == request.remaining
        return count - (request.rows_to_score(count) + samples > self._rows_left)

    def _account(self, item: Item, step: int) -> None:
        request, counters = item.request, self._state.counters
        counters.context_tokens += item.start
        loaded = 0
        if request.staged_for == step:
            loaded = len(request.loading) * self._state.limits.block_size
        counters.prefetched_tokens += loaded
        if request.is_decode:
            counters.decode_context_tokens += item.start
            counters.decode_prefetched_tokens += loaded
        else:
            first_time = max(0, min(item.end, request.num_prompt) - request.prompt_counted)
            request.prompt_counted += first_time
            counters.prompt_tokens += first_time
            counters.recomputed_tokens += item.num_tokens - first_time
        if item.start < len(request.shared) * self._state.limits.block_size:
            sharing.filled(self._state, request, item.start, item.end, step)
        request.planned += item.num_tokens
        request.in_flight += 1
        request.last_step = max(request.last_step, step)
        request.last_turn = step
        request.evicting = False
        if request.staged_for == NO_STEP:  # else it is placed when its step's staging is closed
            self._state.rosters.place(request)

    def _close_staging(self) -> None:
        """The staged step is planned: what was prefetched and did not get in is resident now."""
        state = self._state
        if state.staged_step == NO_STEP:
            return
        for request in list(state.rosters.staged.values()):
            request.last_step = max(request.last_step, request.staged_for)
            request.staged_for = NO_STEP
            state.rosters.place(request)
        sharing.close_staging(state)

    def _skip_orphaned_staging(self, *, forced: bool = False) -> None:
        """When all requests of an ordered prefetch are gone (cancelled, preempted), leave its step
        number unused: a step has one prefetch only. Their blocks are held until the daemon says
        that no copy touches them, so no step needs to wait for these loads.

        Where others share blocks that are being loaded, the next step waits for these loads. Only
        if it is `forced` to do without them, as there is no next step, those others start over."""
        state = self._state
        if state.staged_step == NO_STEP or state.rosters.staged:
            return
        users = sharing.users_of_staged(state)
        if users and not forced:
            return
        for request in sorted(users, key=lambda r: -r.key):
            self._commands += self._preemption.recompute_later(request)
        state.staged_shared.clear()
        state.staged_step = NO_STEP
        state.next_step += 1

    def _slot_target(self) -> SlotTarget:
        """An even share of all requests that decode this round, in flight ones included."""
        state, slots = self._state, self._state.limits.num_slots
        staged = [r.planned for r in state.rosters.staged.values() if r.remaining == 1]
        context = sum(staged) + state.rosters.resident_context
        count = len(staged) + len(state.rosters.resident)
        for step in state.in_flight.values():
            count += step.num_samples
            context += step.sampled_context
        requests, context = -(-count // slots), -(-context // slots)
        return SlotTarget(
            requests=requests,
            context_tokens=context,
            max_requests=state.limits.max_num_seqs,
            turn=state.next_step,
            num_slots=slots,
            device_blocks=state.blocks.num_blocks,
            block_size=state.limits.block_size,
            cost=state.costs.linear(StepFeatures(requests, context)),
            blocks_per_s=state.budget.blocks_per_s,
        )

    def _prefill_chunk(self, items: Sequence[Item], target: SlotTarget, most_tokens: int) -> int:
        """Prompt tokens for a step that already holds `items`."""
        rosters = self._state.rosters
        first = next(iter(rosters.prefilling.values()), None)
        if first is None or most_tokens <= 0 or not self._prefill.part.prompts:
            return 0
        if not self._prefill.part.decodes:
            return most_tokens
        left = sum([len(r.tokens) - r.planned for r in rosters.prefilling.values()])
        left += sum([r.remaining for r in rosters.staged.values() if r.remaining > 1])
        arrivals = NO_ARRIVALS
        if self._state.waiting:
            forecast = self._state.forecast
            arrivals = Arrivals(
                forecast.finishing_per_round, target.requests * forecast.prefill_per_output
            )
        even = self._even_chunk.tokens(left, arrivals, self._state.next_step)
        even = min(even, most_tokens)
        pairs = even * first.planned + even * (even + 1) // 2
        return self._policy.prefill_tokens(
            self._state.costs,
            features_of(items),
            StepFeatures(target.requests, target.context_tokens, even, pairs),
            most_tokens,
        )

    def _may_take_part(self, request: Request) -> bool:
        part = self._prefill.part
        return part.decodes if request.remaining == 1 else part.prompts

    def _prospect(self) -> Prospect:
        return prospect_of(self._state, self._admission.expected_tokens(), self._slot_target())

    def _free_slot(self) -> int:
        used = {step.slot for step in self._state.in_flight.values()}
        return next(s for s in range(self._state.limits.num_slots) if s not in used)

    # KV movement

    def _store(self, items: Iterable[Item], step: int) -> None:
        """Write-through of full blocks: once each, ordered with the step that fills them."""
        state = self._state
        if not self._under_pressure():
            return
        moves: list[BlockMove] = []
        for item in items:
            request = item.request
            full = request.planned // state.limits.block_size
            while request.next_store < full and state.host_used < state.num_host_blocks:
                index = request.next_store
                request.next_store += 1
                kv_key = request.kv_key
                if index < len(request.shared):
                    if request.host[index] != HostState.NONE:
                        continue
                    kv_key = sharing.storing(state, request.shared[index])
                request.host[index] = HostState.STORING
                state.host_used += 1
                state.num_storing += 1
                moves.append(BlockMove(kv_key, index, request.table[index]))
        if moves:
            self._commands.append(
                ToDaemon(Store(epoch=state.epoch, after=step, blocks=tuple(moves)))
            )

    def _under_pressure(self) -> bool:
        """Whether the device pool alone may not do. Until then nothing is stored: copies that
        nobody will read only take memory bandwidth."""
        state = self._state
        if not state.num_host_blocks:
            return False
        if state.rosters.num_incomplete:
            return True
        if state.waiting:
            return self._admission.offloads()
        if state.host_used:
            return True
        peak = max(state.total_blocks, state.expected_peak())
        return peak > OFFLOAD_PRESSURE * state.blocks.num_blocks

    def _plan_prefetch(self, latest: int, urgent: bool = False) -> None:
        """Order the prefetch of the next step into blocks that steps up to `latest` leave free.
        `urgent`: the step has nothing else, so at least one request may exceed the budget."""
        state, rosters = self._state, self._state.rosters
        self._skip_orphaned_staging()
        if state.staged_step != NO_STEP or not rosters.on_host:
            return
        candidates = list(rosters.on_host.values())
        if self._prefill.part != MIXED:
            candidates = [c for c in candidates if self._may_take_part(state.running[c.key])]
        largest = max(map(_LOAD_BLOCKS, candidates), default=0)
        free = min(
            state.blocks.num_ready(latest) - state.growth_reserve,
            max(int(STAGING_SHARE * state.blocks.num_blocks), largest),
        )
        granted = state.budget.grant(largest)
        if urgent:
            granted = max(granted, largest)
        question = (state.next_step, rosters.version, granted, free)
        if not candidates or free <= 0 or question == self._declined:
            return
        outlook = Outlook(self._slot_target(), list(rosters.resident.values()))
        keys = self._policy.choose_prefetch(candidates, granted, free, outlook)
        self._declined = None if keys else question
        step = state.next_step
        moves: list[BlockMove] = []
        after = NO_STEP
        for key in keys:
            request = state.running[key]
            if request.shared and not sharing.take_present(state, request):
                state.rosters.place(request)
                continue  # others brought all that it lacked
            taken = state.blocks.take_for_copy(request.num_missing, latest)
            if taken is None:
                break
            blocks, ready_after = taken
            after = max(after, ready_after)
            moves += state.load_into(request, blocks, step, ready_after)
        if moves:
            state.budget.prefetch_ordered(step, len(moves))
            allowed = min(granted, sum(c.load_blocks for c in candidates))
            state.counters.prefetch_budget_blocks += allowed
            state.counters.prefetch_blocks += len(moves)
            state.staged_step = step
            self._commands.append(
                ToDaemon(Prefetch(epoch=state.epoch, step=step, after=after, blocks=tuple(moves)))
            )

    def _make_room(self, items: Iterable[Item]) -> None:
        """Evict members of the step just planned, so that a later prefetch, or a waiting prompt,
        finds room once the step is computed, and no more than the link can fill. They have the
        longest way to their next turn."""
        state = self._state
        rosters = state.rosters
        part = self._prefill.part
        wanted = rosters.missing_blocks if part.decodes else 0
        staging = min(int(STAGING_SHARE * state.blocks.num_blocks), int(state.budget.per_step))
        if wanted > staging:
            wanted = min(wanted, max(staging, *map(_LOAD_BLOCKS, rosters.on_host.values())))
        wanted += self._admission.wanted_blocks() if part.prompts else 0
        if wanted:
            wanted += state.growth_reserve
        for item in items:
            if state.blocks.num_free >= wanted:
                return
            if item.samples:
                state.evict(item.request)

    def _displace(self) -> bool:
        """In a prefill phase, who decodes makes room on the device for a prompt that is expected to
        fit: the one with the longest way to its next turn, of those whose KV the host holds."""
        state = self._state
        if not state.num_host_blocks or not self._admission.wanted_blocks():
            return False
        idle = sorted(state.rosters.resident.values(), key=lambda c: (-c.last_turn, -c.key))
        return any(state.evict(state.running[c.key]) for c in idle)
