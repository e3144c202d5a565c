"""Going on after a reset: which KV survived, and what has to be computed again.

A stage that died takes its device pool with it, so on all stages only what the host stored is
whole; a daemon that died takes the host pool. Of each request the longest usable prefix stays, the
rest is recomputed like a prompt; a request with no usable prefix waits for admission again.
"""

from array import array

from pipemax.coordinator.cost_model import PipelineCost
from pipemax.coordinator.device_blocks import DeviceBlocks
from pipemax.coordinator.events import Command, Resumed, ToDaemon
from pipemax.coordinator.link_budget import LinkBudget
from pipemax.coordinator.request import NO_BLOCK, NO_STEP, HostState, Request
from pipemax.coordinator.rosters import Rosters
from pipemax.coordinator.state import Releasing, SchedulerState
from pipemax.proto.geometry import blocks_for
from pipemax.proto.messages.control import Drop, Release


def restart_from(state: SchedulerState, event: Resumed) -> list[Command]:
    """Void what was in flight and rebuild the books. Also the first start: nothing runs yet."""
    state.epoch = event.epoch
    state.paused = False
    state.in_flight.clear()
    state.ended_rules.clear()
    state.staged_step = NO_STEP
    state.num_host_blocks = event.num_host_blocks
    state.budget = LinkBudget(event.block_bytes)
    if len(state.costs.stages) != len(event.block_bytes):
        state.costs = PipelineCost(len(event.block_bytes))
    state.costs.warm_up(event.sweeps)
    commands: list[Command] = []
    void: list[Request] = []
    if not event.host_kept:
        state.releasing.clear()
    for request in list(state.running.values()):
        if request.load_step > state.blocks.settled_step:
            for index in request.loading:  # ordered, but nobody saw it arrive
                request.table[index] = NO_BLOCK
        _keep_prefix(request, event, state.limits.block_size)
        if not request.table:
            void.append(request)
        elif event.host_kept:
            # The daemon may have finished stores that were not reported: forget those as well.
            stored = request.next_store
            commands.append(
                ToDaemon(Drop(epoch=state.epoch, request=request.kv_key, first_index=stored))
            )
    for request in reversed(void):
        _send_back(state, request, event.host_kept)
    _rebuild_books(state, event)
    if state.releasing:
        # Said in the epoch that ended, it may have been ignored; said again, it is answered.
        commands.append(ToDaemon(Release(epoch=state.epoch, requests=tuple(state.releasing))))
    return commands


def _keep_prefix(request: Request, event: Resumed, block_size: int) -> None:
    """Cut the request's KV to what survived and is gapless."""
    full = request.computed // block_size
    stored = min(request.stored_prefix(), full) if event.host_kept else 0
    usable = 0
    for block in request.table[: blocks_for(request.computed, block_size)]:
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
    request.computed = min(request.computed, usable * block_size)
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
    state.put_first(request)


def _rebuild_books(state: SchedulerState, event: Resumed) -> None:
    """Nothing is in flight: every device block that is in no table is free at once."""
    for entry in state.releasing.values():
        entry.device_blocks = []
    state.rosters = Rosters()
    for request in state.running.values():
        state.rosters.place(request)
    state.total_blocks = sum(len(r.table) for r in state.running.values())
    state.num_storing = 0
    used = [b for r in state.running.values() for b in r.table if b != NO_BLOCK]
    state.blocks = DeviceBlocks(event.num_device_blocks, used)
    state.host_used = sum(r.next_store for r in state.running.values())
    state.host_used += sum(entry.host_blocks for entry in state.releasing.values())
