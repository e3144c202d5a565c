"""Plans steps over the scheduler's state.

The order of work, for each free slot: admit what fits, compose the step (prefetched requests
first, then device-resident ones up to the slot's even share, then prompt chunks in what is left of
the token budget), then let KvMoves order the stores of the blocks it fills, look one turn ahead for
the prefetch of the next step, and evict after this step what the one after that needs room for.
"""

from collections.abc import Sequence

from pipemax.coordinator import sharing
from pipemax.coordinator.admission import Admission
from pipemax.coordinator.cost_model import StepFeatures
from pipemax.coordinator.events import Command, ToStages
from pipemax.coordinator.kv_moves import KvMoves
from pipemax.coordinator.phases import Prefill, Prospect
from pipemax.coordinator.plan_message import build_step_plan
from pipemax.coordinator.policy import Candidate, SelectionPolicy, SlotTarget
from pipemax.coordinator.preemption import Preemption
from pipemax.coordinator.prefill_pacing import NO_ARRIVALS, Arrivals, EvenChunk
from pipemax.coordinator.prospect import prospect_of
from pipemax.coordinator.request import NO_STEP, Request
from pipemax.coordinator.rosters import candidate_of
from pipemax.coordinator.state import Item, SchedulerState, StepInFlight, features_of
from pipemax.proto.errors import InvariantError


class Planner:
    def __init__(self, state: SchedulerState, policy: SelectionPolicy, prefill: Prefill) -> None:
        self._state = state
        self._policy = policy
        self._prefill = prefill
        self._preemption = Preemption(state)
        self._admission = Admission(state, policy, prefill)
        self._kv = KvMoves(
            state, policy, prefill, self._admission, self._preemption, self._slot_target
        )
        self._even_chunk = EvenChunk(state.limits.num_slots)
        self._rows_left = 0
        """Rows of logits that the step being composed may still have; stages have room for as many
        as requests."""
        self._commands: list[Command] = []

    def pump(self, now: float) -> list[Command]:
        """Plan whatever can be planned now."""
        state = self._state
        self._commands = []
        if state.paused:
            return []
        while True:
            while len(state.in_flight) < state.limits.num_slots and self._plan_step(now):
                pass
            self._commands += self._kv.prefetch(latest=state.next_step - 2)
            released = self._preemption.free_blocks()
            if released is None:
                return self._commands
            self._commands += released

    # One step

    def _plan_step(self, now: float) -> bool:
        state = self._state
        self._commands += self._kv.skip_orphaned_staging()
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
        self._kv.close_staging()
        self._commands += self._kv.store(items, step)
        self._commands += self._kv.prefetch(latest=step - 1)
        self._kv.make_room(items)
        return True

    def _find_items(self, now: float) -> list[Item]:
        """Of those who may take part now; none when none of them can."""
        state = self._state
        if self._prefill.part.prompts:
            self._admission.admit(now)
            while not self._prefill.part.decodes and self._kv.displace():
                self._admission.admit(now)
        items = self._compose()
        if not items and not state.in_flight:
            self._commands += self._kv.skip_orphaned_staging(forced=True)
        if not items and state.staged_step == NO_STEP:
            # Nothing on the device can run: order a prefetch although this step will wait for it.
            self._commands += self._kv.prefetch(latest=state.next_step - 1, urgent=True)
            items = self._compose()
        return items

    def _compose(self) -> list[Item]:
        """The items of the next step; allocates the blocks they fill."""
        state = self._state
        part = self._prefill.part
        staged = [r for r in state.rosters.staged.values() if part.admits(r.remaining)]
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

    def _prospect(self) -> Prospect:
        return prospect_of(self._state, self._admission.expected_tokens(), self._slot_target())

    def _free_slot(self) -> int:
        used = {step.slot for step in self._state.in_flight.values()}
        return next(s for s in range(self._state.limits.num_slots) if s not in used)
