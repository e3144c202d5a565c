"""What must hold of the scheduling core's books after every event. For tests: it looks at all."""

from pipemax.coordinator.prefixes import SharedBlock
from pipemax.coordinator.request import NO_BLOCK, HostState, Request
from pipemax.coordinator.state import SchedulerState
from pipemax.proto.errors import InvariantError
from pipemax.proto.geometry import blocks_for


def check(state: SchedulerState) -> None:
    """Raises InvariantError when the books contradict themselves."""
    state.blocks.check()
    owned = state.blocks.free_blocks()
    owned += [b for entry in state.releasing.values() for b in entry.device_blocks]
    owned += [block.device for block in state.prefixes if block.device != NO_BLOCK]
    for request in state.running.values():
        owned += [b for b in request.table[len(request.shared) :] if b != NO_BLOCK]
        _check_request(state, request)
    if sorted(owned) != list(range(state.blocks.num_blocks)):
        raise InvariantError("device blocks are lost or owned twice")
    _check_shared(state)
    _check_sums(state)
    keys = [*state.waiting, *state.running]
    if len(set(keys)) != len(keys):
        raise InvariantError("a request is both waiting and running")
    slots = [step.slot for step in state.in_flight.values()]
    if len(set(slots)) != len(slots) or len(slots) > state.limits.num_slots:
        raise InvariantError("two steps in flight share a slot")


def _check_sums(state: SchedulerState) -> None:
    running = state.running.values()
    shared = list(state.prefixes)
    state.rosters.check(state.running)
    own = [(r.host[len(r.shared) :]) for r in running]
    if state.total_blocks != sum(map(len, own)) + len(shared):
        raise InvariantError("blocks of running requests are miscounted")
    on_host = sum(len(host) - host.count(HostState.NONE) for host in own)
    on_host += sum(block.host != HostState.NONE for block in shared)
    if on_host + sum(e.host_blocks for e in state.releasing.values()) != state.host_used:
        raise InvariantError("host blocks are miscounted")
    if state.host_used > state.num_host_blocks:
        raise InvariantError("more host blocks in use than there are")
    storing = sum(host.count(HostState.STORING) for host in own)
    storing += sum(block.host == HostState.STORING for block in shared)
    if state.num_storing != storing:
        raise InvariantError("blocks being stored are miscounted")
    if not state.forecast.check(state.running):
        raise InvariantError("the forecast is out of date")


def _check_shared(state: SchedulerState) -> None:
    uses: dict[SharedBlock, int] = {}
    named: dict[SharedBlock, int] = {}
    for request in state.running.values():
        for index, block in enumerate(request.shared):
            uses[block] = uses.get(block, 0) + 1
            if request.table[index] == NO_BLOCK:
                continue
            named[block] = named.get(block, 0) + 1
            if request.table[index] != block.device:
                raise InvariantError(f"request {request.key}: block {index} is shared elsewhere")
    if {block: block.num_users for block in state.prefixes} != uses:
        raise InvariantError("users of shared blocks are miscounted")
    if state.prefixes.num_references != sum(uses.values()):
        raise InvariantError("references to shared blocks are miscounted")
    for block in uses:
        if block.device_refs != named.get(block, 0):
            raise InvariantError("tables that name a shared block are miscounted")
        is_staged = block.load_step == state.staged_step and block in state.staged_shared
        if block.device != NO_BLOCK and not block.device_refs and not is_staged:
            raise InvariantError("a shared block is on the device for nobody")
        if block.device == NO_BLOCK and not (block.ready and block.host == HostState.STORED):
            raise InvariantError("a shared block is nowhere")
        if block.host != HostState.NONE and not block.ready:
            raise InvariantError("a shared block was stored unfilled")


def _check_request(state: SchedulerState, request: Request) -> None:
    size, own = state.limits.block_size, len(request.shared)
    if not request.computed <= request.planned <= len(request.tokens):
        raise InvariantError(f"request {request.key}: lengths out of order")
    if len(request.table) != len(request.host) or request.num_missing != request.table.count(
        NO_BLOCK
    ):
        raise InvariantError(f"request {request.key}: block table miscounted")
    if len(request.table) < blocks_for(request.planned, size):
        raise InvariantError(f"request {request.key}: tokens without a block")
    for index, (block, host) in enumerate(zip(request.table, request.host, strict=True)):
        if block == NO_BLOCK and host != HostState.STORED:
            raise InvariantError(f"request {request.key}: block {index} is nowhere")
        if index < own and host != request.shared[index].host:
            raise InvariantError(f"request {request.key}: block {index} is said to be elsewhere")
        if index >= own and host != HostState.NONE and (index + 1) * size > request.planned:
            raise InvariantError(f"request {request.key}: block {index} stored unfilled")
        is_passed = (index + 1) * size <= request.planned
        if index < own and is_passed and not request.shared[index].ready:
            raise InvariantError(f"request {request.key}: block {index} was never filled")
    flights = sum(
        item.request is request for step in state.in_flight.values() for item in step.items
    )
    if flights != request.in_flight:
        raise InvariantError(f"request {request.key}: steps in flight miscounted")
