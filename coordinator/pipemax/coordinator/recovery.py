"""Going on after a reset: which KV survived, and what has to be computed again.

A stage that died takes its device pool with it, so on all stages only what the host stored is
whole; a daemon that died takes the host pool. Of each request the longest usable prefix stays, the
rest is recomputed like a prompt; a request with no usable prefix waits for admission again.
"""

from array import array
from itertools import takewhile

from pipemax.coordinator.cost_model import PipelineCost
from pipemax.coordinator.device_blocks import DeviceBlocks
from pipemax.coordinator.events import Command, Resumed, ToDaemon
from pipemax.coordinator.link_budget import LinkBudget
from pipemax.coordinator.prefixes import SharedBlock
from pipemax.coordinator.releasing import Releasing, release_of
from pipemax.coordinator.request import NO_BLOCK, NO_STEP, HostState, Request
from pipemax.coordinator.rosters import Rosters
from pipemax.coordinator.state import SchedulerState
from pipemax.proto.geometry import blocks_for
from pipemax.proto.messages.control import Drop


def restart_from(state: SchedulerState, event: Resumed) -> list[Command]:
    """Void what was in flight and rebuild the books. Also the first start: nothing runs yet."""
    state.epoch = event.epoch
    state.paused = False
    state.in_flight.clear()
    state.ended_rules.clear()
    state.staged_step = NO_STEP
    state.staged_shared.clear()
    state.num_host_blocks = event.num_host_blocks
    state.budget = LinkBudget(event.block_bytes)
    if len(state.costs.stages) != len(event.block_bytes):
        state.costs = PipelineCost(len(event.block_bytes))
    state.costs.warm_up(event.sweeps)
    if not event.host_kept:
        state.releasing.clear()
    owners = {block.kv_key for block in state.prefixes}
    _keep_shared(state, event)
    void: list[Request] = []
    stored = _stored_by_owner(state, owners)
    for request in list(state.running.values()):
        if request.load_step > state.blocks.settled_step:
            for index in request.loading:  # ordered, but nobody saw it arrive
                if index >= len(request.shared):
                    request.table[index] = NO_BLOCK
        _keep_prefix(request, event, state.limits.block_size)
        if not request.table:
            void.append(request)
        stored[request.kv_key] = request.next_store
    for request in reversed(void):
        _send_back(state, request, event.host_kept)
    _rebuild_books(state, event)
    return _tell_daemon(state, stored) if event.host_kept else []


def _tell_daemon(state: SchedulerState, stored: dict[int, int]) -> list[Command]:
    """`stored`: by name, the blocks that count as stored. The daemon may have finished stores that
    were not reported: it forgets those as well."""
    commands: list[Command] = [
        ToDaemon(Drop(epoch=state.epoch, request=kv_key, first_index=first))
        for kv_key, first in stored.items()
        if kv_key not in state.releasing
    ]
    if state.releasing:
        # Said in the epoch that ended, it may have been ignored; said again, it is answered.
        for kv_key, entry in state.releasing.items():
            entry.answers = 1
            entry.first_index = min(entry.first_index, stored.get(kv_key, entry.first_index))
        commands.append(ToDaemon(release_of(state.epoch, state.releasing)))
    return commands


def _keep_shared(state: SchedulerState, event: Resumed) -> None:
    """Cut every chain of shared blocks to those that survived, each with all before it."""
    settled = state.blocks.settled_step
    kept: set[SharedBlock] = set()
    for block in state.prefixes:
        first = block.parent is None
        if block.load_step > settled or not event.device_kept:
            block.device = NO_BLOCK
        parent_stored = first or (block.parent and block.parent.host == HostState.STORED)
        if not (event.host_kept and block.host == HostState.STORED and parent_stored):
            block.host = HostState.NONE
        is_somewhere = block.device != NO_BLOCK or block.host == HostState.STORED
        is_filled = block.ready and block.filled_step <= settled
        if is_filled and is_somewhere and (first or block.parent in kept):
            kept.add(block)
        block.filler = None
        block.filled_step = block.load_step = block.last_step = NO_STEP
        block.device_refs = 0
    chains: dict[Request, list[SharedBlock]] = {}
    for request in state.running.values():
        chain = list(takewhile(kept.__contains__, request.shared))
        chains[request] = chain
        for index, block in enumerate(chain):
            request.table[index] = block.device
            request.host[index] = block.host
            block.device_refs += block.device != NO_BLOCK
        for index in range(len(chain), len(request.shared)):
            request.table[index] = NO_BLOCK
            request.host[index] = HostState.NONE
    state.prefixes.replant(chains)


def _stored_by_owner(state: SchedulerState, owners: set[int]) -> dict[int, int]:
    """Of those who gave shared blocks their names, the blocks that the host keeps for others."""
    stored = dict.fromkeys(owners, 0)
    for block in state.prefixes:
        if block.host == HostState.STORED:
            stored[block.kv_key] = max(stored[block.kv_key], block.index + 1)
    return stored


def _keep_prefix(request: Request, event: Resumed, block_size: int) -> None:
    """Cut the request's KV to what survived and is gapless."""
    # What it shares is whole, whether or not it has come that far itself.
    computed = max(request.computed, len(request.shared) * block_size)
    full = computed // block_size
    stored = min(request.stored_prefix(), full) if event.host_kept else 0
    usable = 0
    for block in request.table[: blocks_for(computed, block_size)]:
        on_device = event.device_kept and block != NO_BLOCK
        if not on_device and usable >= stored:
            break
        usable += 1
    kept = request.table[:usable]
    request.table = kept if event.device_kept else array("i", [NO_BLOCK]) * usable
    stored = min(stored, usable)
    request.host = bytearray([HostState.STORED] * stored + [HostState.NONE] * (usable - stored))
    request.next_store = stored
    request.num_missing = request.table.count(NO_BLOCK)
    request.computed = min(computed, usable * block_size)
    request.planned = request.computed
    request.in_flight = 0
    request.last_step = NO_STEP
    request.staged_for = NO_STEP
    request.load_step = NO_STEP
    request.loading = []
    request.evicting = False


def _send_back(state: SchedulerState, request: Request, host_kept: bool) -> None:
    state.stop_running(request)
    if host_kept:
        state.releasing[request.kv_key] = Releasing(0, [], NO_STEP)
    state.waiting.put_first(request)


def _rebuild_books(state: SchedulerState, event: Resumed) -> None:
    """Nothing is in flight: every device block that is in no table is free at once."""
    for entry in state.releasing.values():
        entry.device_blocks = []
    state.rosters = Rosters()
    state.rosters.start_over(state.running.values())
    running, shared = state.running.values(), list(state.prefixes)
    state.total_blocks = sum(len(r.table) for r in running) - state.prefixes.num_saved
    state.num_storing = 0
    used = {b for r in running for b in r.table if b != NO_BLOCK}
    state.blocks = DeviceBlocks(event.num_device_blocks, used)
    state.host_used = sum(
        r.next_store - r.host.count(HostState.STORED, 0, len(r.shared)) for r in running
    )
    state.host_used += sum(block.host == HostState.STORED for block in shared)
    state.host_used += sum(entry.host_blocks for entry in state.releasing.values())
