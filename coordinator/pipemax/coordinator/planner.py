"""Plans steps over the scheduler's state.

The order of work, for each free slot: admit what fits, compose the step (prefetched requests
first, then device-resident ones up to the slot's even share, then prompt chunks in what is left of
the token budget), then let KvMoves order the stores of the blocks it fills, look one turn ahead for
the prefetch of the next step, and evict after this step what the one after that needs room for.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from operator import attrgetter

from pipemax.coordinator import sharing
from pipemax.coordinator.admission import Admission
from pipemax.coordinator.candidates import Candidates
from pipemax.coordinator.cost_model import StepFeatures
from pipemax.coordinator.events import Command, ToStages
from pipemax.coordinator.kv_moves import KvMoves
from pipemax.coordinator.phases import Prefill, Prospect
from pipemax.coordinator.plan_message import build_step_plan
from pipemax.coordinator.policy import SelectionPolicy, SlotTarget
from pipemax.coordinator.preemption import Preemption
from pipemax.coordinator.prefill_pacing import NO_ARRIVALS, Arrivals, EvenChunk
from pipemax.coordinator.prospect import prospect_of
from pipemax.coordinator.request import NO_STEP, Request
from pipemax.coordinator.rosters import candidate_of, residents_of
from pipemax.coordinator.state import (
    Decodes,
    Item,
    Part,
    SchedulerState,
    StepInFlight,
    features_of,
    num_items,
)
from pipemax.proto.errors import InvariantError

_LOOKED_AT_FIRST = 64
_FIRST_TOKEN = attrgetter("first_token_at")


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
        parts = self._find_parts(now)
        for _ in range(2):  # who was just admitted may already lack one token only
            if parts or not self._prefill.turn(is_idle=not state.in_flight):
                break
            parts = self._find_parts(now)
        if not parts:
            return False
        step = state.next_step
        slot = self._free_slot()
        for part in parts:
            if isinstance(part, Decodes):
                self._account_decodes(part, step)
            else:
                self._account(part, step)
        plan = build_step_plan(
            parts,
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
        flight = state.in_flight[step] = StepInFlight(slot, parts)
        self._prefill.planned(flight.features.prefill_tokens, state.held_tokens)
        state.next_step += 1
        state.counters.steps += 1
        state.budget.step_planned(step, state.costs.predict(flight.features))
        self._kv.close_staging()
        self._commands += self._kv.store(parts, step)
        self._commands += self._kv.prefetch(latest=step - 1)
        self._kv.make_room(parts)
        return True

    def _find_parts(self, now: float) -> list[Part]:
        """Of those who may take part now; none when none of them can."""
        state = self._state
        if self._prefill.part.prompts:
            self._admission.admit(now)
            while not self._prefill.part.decodes and self._kv.displace():
                self._admission.admit(now)
        parts = self._compose()
        if not parts and not state.in_flight:
            self._commands += self._kv.skip_orphaned_staging(forced=True)
        if not parts and state.staged_step == NO_STEP:
            # Nothing on the device can run: order a prefetch although this step will wait for it.
            self._commands += self._kv.prefetch(latest=state.next_step - 1, urgent=True)
            parts = self._compose()
        return parts

    def _compose(self) -> list[Part]:
        """The parts of the next step; allocates the blocks they fill."""
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
        for request in staged:
            if len(items) < limits.max_num_seqs and tokens < limits.max_num_batched_tokens:
                tokens += self._add(items, request, limits.max_num_batched_tokens - tokens)
        chosen = [state.running[key] for key in keys]
        decodes = self._decodes(chosen, len(items), limits.max_num_batched_tokens - tokens)
        parts: list[Part] = [*items]
        if decodes is not None:
            parts.append(decodes)
            tokens += len(chosen)
            items = []
        else:
            for request in chosen:
                if len(items) < limits.max_num_seqs and tokens < limits.max_num_batched_tokens:
                    tokens += self._add(items, request, limits.max_num_batched_tokens - tokens)
            parts = [*items]
            items = []
        size = num_items(parts)
        chunk = self._prefill_chunk(parts, target, limits.max_num_batched_tokens - tokens)
        for request in self._prefilling():
            if chunk <= 0 or size + len(items) >= limits.max_num_seqs:
                break
            chunk -= self._add(items, request, chunk)
        return parts + items

    def _prefilling(self) -> Iterator[Request]:
        """In order. Few are looked at, of what may be thousands; meanwhile they may change."""
        prefilling = self._state.rosters.prefilling
        first = list(islice(prefilling.values(), _LOOKED_AT_FIRST))
        yield from first
        if len(first) == _LOOKED_AT_FIRST:
            seen = {request.key for request in first}
            yield from [r for r in prefilling.values() if r.key not in seen]

    def _decodes(self, chosen: list[Request], others: int, most_tokens: int) -> Decodes | None:
        """All of these residents at once, beside `others`; None where they must be looked at one
        by one, because something may run out."""
        state, count = self._state, len(chosen)
        room = min(self._rows_left, state.limits.max_num_seqs - others, most_tokens)
        if not count or count > room:
            return None
        tables = [request.table for request in chosen]
        starts = [request.planned for request in chosen]
        size = state.limits.block_size
        held = [len(table) * size for table in tables]
        short = [i for i, start in enumerate(starts) if start >= held[i]]
        if None in map(_FIRST_TOKEN, chosen):
            return None  # its one token is a prompt's
        taken = state.blocks.take_for_write(len(short))
        if taken is None:
            return None
        for index, block in zip(short, reversed(taken), strict=True):
            state.extend_table(chosen[index], [block])
        self._rows_left -= count
        return Decodes(chosen, starts, tables)

    def _residents(self) -> Candidates:
        """Device-resident requests that can take their turn: each finds a block if it needs one."""
        state = self._state
        residents = state.rosters.resident.values()
        if not self._prefill.part.decodes:
            return residents_of(())
        if state.blocks.num_free:
            return residents_of(residents)
        size = state.limits.block_size
        return residents_of([r for r in residents if not r.blocks_short(1, size)])

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

    def _account_decodes(self, part: Decodes, step: int) -> None:
        """As `_account` of each."""
        counters, context_tokens = self._state.counters, sum(part.starts)
        counters.context_tokens += context_tokens
        counters.decode_context_tokens += context_tokens
        self._state.rosters.depart(part.requests, context_tokens)
        for request in part.requests:
            request.planned += 1
            request.in_flight = 1
            request.last_step = step
            request.last_turn = step
            request.evicting = False

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

    def _prefill_chunk(self, parts: Sequence[Part], target: SlotTarget, most_tokens: int) -> int:
        """Prompt tokens for a step that already holds `parts`."""
        rosters = self._state.rosters
        first = next(iter(rosters.prefilling.values()), None)
        if first is None or most_tokens <= 0 or not self._prefill.part.prompts:
            return 0
        if not self._prefill.part.decodes:
            return most_tokens
        left = rosters.prefill_left
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
            features_of(parts),
            StepFeatures(target.requests, target.context_tokens, even, pairs),
            most_tokens,
        )

    def _prospect(self) -> Prospect:
        return prospect_of(self._state, self._admission.expected_tokens(), self._slot_target())

    def _free_slot(self) -> int:
        used = {step.slot for step in self._state.in_flight.values()}
        return next(s for s in range(self._state.limits.num_slots) if s not in used)
