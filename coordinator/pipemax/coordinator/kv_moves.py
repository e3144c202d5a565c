"""Which KV moves between device and host, and when: stores of what a step fills, the prefetch of
the next one, and who leaves the device to make room."""

from collections.abc import Callable, Iterable, Iterator

import numpy as np

from pipemax.coordinator import sharing
from pipemax.coordinator.admission import Admission
from pipemax.coordinator.events import Command, ToDaemon
from pipemax.coordinator.phases import MIXED, Prefill
from pipemax.coordinator.policy import Outlook, SelectionPolicy, SlotTarget
from pipemax.coordinator.preemption import Preemption
from pipemax.coordinator.request import NO_STEP, HostState, Request
from pipemax.coordinator.state import Decodes, Part, SchedulerState
from pipemax.proto.messages.control import BlockMove, Prefetch, Store

STAGING_SHARE = 0.5
"""Most of the device pool that one step's prefetch may take. Two prefetches are alive at a time
(one being read, one being loaded), so more than half could never be used."""
OFFLOAD_PRESSURE = 0.9
"""Write-through starts when the expected need exceeds this share of the device pool."""


class KvMoves:
    """Changes the state, and returns what the daemon is to be told of it."""

    def __init__(
        self,
        state: SchedulerState,
        policy: SelectionPolicy,
        prefill: Prefill,
        admission: Admission,
        preemption: Preemption,
        slot_target: Callable[[], SlotTarget],
    ) -> None:
        """`slot_target`: an even share of what can run now."""
        self._state = state
        self._policy = policy
        self._prefill = prefill
        self._admission = admission
        self._preemption = preemption
        self._slot_target = slot_target
        self._declined: tuple[int, int, int, int] | None = None
        """What the policy was asked when it last chose nobody: it would do so again."""

    def close_staging(self) -> None:
        """The staged step is planned: what was prefetched and did not get in is resident now."""
        state = self._state
        if state.staged_step == NO_STEP:
            return
        for request in list(state.rosters.staged.values()):
            request.last_step = max(request.last_step, request.staged_for)
            request.staged_for = NO_STEP
            state.rosters.place(request)
        sharing.close_staging(state)

    def skip_orphaned_staging(self, *, forced: bool = False) -> list[Command]:
        """When all requests of an ordered prefetch are gone (cancelled, preempted), leave its step
        number unused: a step has one prefetch only. Their blocks are held until the daemon says
        that no copy touches them, so no step needs to wait for these loads.

        Where others share blocks that are being loaded, the next step waits for these loads. Only
        if it is `forced` to do without them, as there is no next step, those others start over."""
        state = self._state
        commands: list[Command] = []
        if state.staged_step == NO_STEP or state.rosters.staged:
            return commands
        users = sharing.users_of_staged(state)
        if users and not forced:
            return commands
        for request in sorted(users, key=lambda r: -r.key):
            commands += self._preemption.recompute_later(request)
        state.staged_shared.clear()
        state.staged_step = NO_STEP
        state.next_step += 1
        return commands

    def store(self, parts: Iterable[Part], step: int) -> list[Command]:
        """Write-through of full blocks: once each, ordered with the step that fills them."""
        state = self._state
        if not self._under_pressure():
            return []
        moves: list[BlockMove] = []
        size = state.limits.block_size
        for request in _requests_of(parts):
            full = request.planned // size
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
        if not moves:
            return []
        return [ToDaemon(Store(epoch=state.epoch, after=step, blocks=tuple(moves)))]

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
        enough = OFFLOAD_PRESSURE * state.blocks.num_blocks
        if state.forecast.most_blocks <= enough:
            return False
        return max(state.total_blocks, state.expected_peak()) > enough

    def prefetch(self, latest: int, urgent: bool = False) -> list[Command]:
        """Order the prefetch of the next step into blocks that steps up to `latest` leave free.
        `urgent`: the step has nothing else, so at least one request may exceed the budget."""
        state, rosters = self._state, self._state.rosters
        commands = self.skip_orphaned_staging()
        if state.staged_step != NO_STEP or not len(rosters.on_host):
            return commands
        candidates = rosters.on_host.columns()
        part = self._prefill.part
        if part != MIXED:
            remaining = [state.running[key].remaining for key in candidates.keys.tolist()]
            candidates = candidates.those(np.flatnonzero(list(map(part.admits, remaining))))
        largest = int(candidates.load_blocks.max(initial=0))
        free = min(
            state.blocks.num_ready(latest) - state.growth_reserve,
            max(int(STAGING_SHARE * state.blocks.num_blocks), largest),
        )
        granted = state.budget.grant(largest)
        if urgent:
            granted = max(granted, largest)
        question = (state.next_step, rosters.version, granted, free)
        if not len(candidates) or free <= 0 or question == self._declined:
            return commands
        outlook = Outlook(self._slot_target(), rosters.residents())
        allowed = min(granted, int(candidates.load_blocks.sum()))
        keys = self._policy.choose_prefetch(candidates, granted, free, outlook)
        self._declined = None if keys else question
        moves, after = self._load(keys, latest)
        if not moves:
            return commands
        step = state.next_step
        state.budget.prefetch_ordered(step, len(moves))
        state.counters.prefetch_budget_blocks += allowed
        state.counters.prefetch_blocks += len(moves)
        state.staged_step = step
        prefetch = Prefetch(epoch=state.epoch, step=step, after=after, blocks=tuple(moves))
        return [*commands, ToDaemon(prefetch)]

    def _load(self, keys: Iterable[int], latest: int) -> tuple[list[BlockMove], int]:
        """Gives these requests the blocks that they lack, for the next step. Returns what has to be
        copied, and the step that must be computed before."""
        state = self._state
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
            moves += state.load_into(request, blocks, state.next_step, ready_after)
        return moves, after

    def make_room(self, parts: Iterable[Part]) -> None:
        """Evict members of the step just planned, so that a later prefetch, or a waiting prompt,
        finds room once the step is computed, and no more than the link can fill. They have the
        longest way to their next turn."""
        state = self._state
        rosters = state.rosters
        part = self._prefill.part
        wanted = rosters.missing_blocks if part.decodes else 0
        staging = min(int(STAGING_SHARE * state.blocks.num_blocks), int(state.budget.per_step))
        if wanted > staging:
            wanted = min(wanted, max(staging, int(rosters.on_host.columns().load_blocks.max())))
        wanted += self._admission.wanted_blocks() if part.prompts else 0
        if wanted:
            wanted += state.growth_reserve
        if state.blocks.num_free >= wanted:
            return
        for request in _requests_of(parts, sampling_only=True):
            state.evict(request)
            if state.blocks.num_free >= wanted:
                return

    def displace(self) -> bool:
        """In a prefill phase, who decodes makes room on the device for a prompt that is expected to
        fit: the one with the longest way to its next turn, of those whose KV the host holds."""
        state = self._state
        if not state.num_host_blocks or not self._admission.wanted_blocks():
            return False
        idle = sorted(state.rosters.resident.values(), key=lambda r: (-r.last_turn, -r.key))
        return any(map(state.evict, idle))


def _requests_of(parts: Iterable[Part], *, sampling_only: bool = False) -> Iterator[Request]:
    """Of all items in order, or of those that sample."""
    for part in parts:
        if isinstance(part, Decodes):
            yield from part.requests
        elif part.samples or not sampling_only:
            yield part.request
