"""What running requests do with the blocks that they share: take, fill, evict, load, give back.

A shared block is on the device while a table names it (`device_refs`), and on the host once it was
stored for anybody. Who is evicted gives its reference up; who comes back finds the block still
there, or loads it for all. Blocks that more requests use than there are slots stay on the device:
in nearly every step somebody would have to load them again.
"""

from array import array
from typing import TYPE_CHECKING

from pipemax.coordinator.prefixes import SharedBlock, shareable_blocks
from pipemax.coordinator.releasing import Releasing, merge_into
from pipemax.coordinator.request import NO_BLOCK, NO_STEP, HostState, Request
from pipemax.proto.geometry import blocks_for

if TYPE_CHECKING:
    from pipemax.coordinator.state import SchedulerState


def give_prompt(state: "SchedulerState", request: Request, blocks: list[int]) -> None:
    """A request that was just admitted takes the blocks that its prompt shares, and `blocks` for
    the rest of it; those of them that are full are there for others to share."""
    num_shareable = shareable_blocks(request, state.limits.block_size)
    if state.limits.share_prefixes and num_shareable:
        chain = list(state.prefix_of(request))
        for block in chain:
            request.table.append(block.device)
            request.host.append(block.host)
            block.device_refs += block.device != NO_BLOCK
        request.num_missing = request.table.count(NO_BLOCK)
        num_own = num_shareable - len(chain)
        state.prefixes.grow(chain, request, array("i", blocks[:num_own]))
        for block in chain[len(chain) - num_own :]:
            block.device_refs = 1
        request.shared = chain
        state.prefixes.enter(request)
        if not request.prompt_counted:
            state.counters.prefix_query_tokens += request.num_prompt
    state.extend_table(request, blocks)
    if request.shared:
        skip_ready(state, request)


def skip_ready(state: "SchedulerState", request: Request) -> None:
    """Go on behind the blocks that others have filled, or are about to fill in steps planned."""
    size, shared = state.limits.block_size, request.shared
    index = request.planned // size
    start = index
    while index < len(shared) and shared[index].ready:
        index += 1
    if index == start:
        state.rosters.place(request)
        return
    request.planned = index * size
    new = max(0, request.planned - request.prompt_counted)
    request.prompt_counted += new
    state.counters.prompt_tokens += new
    state.counters.prefix_hit_tokens += new
    state.rosters.place(request)


def tokens_to_fill(state: "SchedulerState", request: Request, count: int) -> int:
    """Of the request's next `count` tokens, those before a block that another one has filled or is
    filling: that one's are waited for."""
    size, shared = state.limits.block_size, request.shared
    end = min(len(shared), blocks_for(request.planned + count, size))
    for index in range(request.planned // size, end):
        if shared[index].ready or _is_being_filled(state, shared[index], request):
            return max(0, index * size - request.planned)
    return count


def claim(state: "SchedulerState", request: Request, count: int) -> None:
    """The request fills blocks with its next `count` tokens, in the step that is being composed."""
    size, shared = state.limits.block_size, request.shared
    end = min(len(shared), blocks_for(request.planned + count, size))
    for index in range(request.planned // size, end):
        shared[index].filler = request


def filled(state: "SchedulerState", request: Request, start: int, end: int, step: int) -> None:
    """`step`, just planned, computes the request's tokens from `start` to `end`."""
    size, shared = state.limits.block_size, request.shared
    for block in shared[start // size : min(len(shared), end // size)]:
        block.ready = True
        block.filled_step = step
        block.filler = None


def _is_being_filled(state: "SchedulerState", block: SharedBlock, asking: Request) -> bool:
    """By somebody else who can go on with it: nobody waits for who left or waits on the host."""
    filler = block.filler
    if filler is None or filler is asking:
        return False
    rosters = state.rosters
    present = rosters.prefilling.get(filler.key) or rosters.staged.get(filler.key)
    shared = filler.shared
    return present is filler and len(shared) > block.index and shared[block.index] is block


def take_present(state: "SchedulerState", request: Request) -> int:
    """Enters the shared blocks that the request lacks and the device has into its table. Returns
    how many blocks it still lacks."""
    table = request.table
    for index, block in enumerate(request.shared):
        if table[index] == NO_BLOCK and block.device != NO_BLOCK:
            table[index] = block.device
            block.device_refs += 1
            request.num_missing -= 1
    return request.num_missing


def loaded(state: "SchedulerState", block: SharedBlock, device: int, step: int, after: int) -> int:
    """A shared block is loaded into `device`, which step `after` still uses, for `step`. Returns
    whose it is on the daemon."""
    block.device = device
    block.device_refs = 1
    block.load_step = step
    block.last_step = max(block.last_step, after)
    state.staged_shared.append(block)
    return block.kv_key


def storing(state: "SchedulerState", block: SharedBlock) -> int:
    """A store of the block is ordered. Returns whose it is on the daemon."""
    block.host = HostState.STORING
    for user in state.prefixes.users(block):
        user.host[block.index] = HostState.STORING
    return block.kv_key


def is_kept(state: "SchedulerState", block: SharedBlock) -> bool:
    """Whether it stays on the device when one of its users is evicted."""
    return block.num_users > state.limits.num_slots


def give_up(state: "SchedulerState", request: Request, index: int) -> int:
    """The request's table is to name the shared block no more. Returns how many blocks are free
    now; the table is the caller's."""
    block = request.shared[index]
    _unname(block, request)
    return 0 if block.device_refs else _drop(state, block)


def _unname(block: SharedBlock, request: Request) -> None:
    block.last_step = max(block.last_step, request.last_step)
    block.device_refs -= 1


def _drop(state: "SchedulerState", block: SharedBlock) -> int:
    """Nobody's table names it any more. While it is being loaded for a step that is not planned, it
    stays where it is: nothing else says when its device block can be written to again."""
    if _is_staged(state, block):
        return 0
    state.blocks.release([block.device], max(block.last_step, block.load_step))
    block.device = NO_BLOCK
    return 1


def close_staging(state: "SchedulerState") -> None:
    """The staged step is planned: it waits for what was loaded, so later steps can do without."""
    staged, state.staged_shared = state.staged_shared, []
    state.staged_step = NO_STEP
    for block in staged:
        if not block.device_refs and block.device != NO_BLOCK:
            _drop(state, block)


def users_of_staged(state: "SchedulerState") -> list[Request]:
    """Those who count on a block that is being loaded for the staged step."""
    found = {}
    for block in state.staged_shared:
        if block.device != NO_BLOCK:
            found.update({user.key: user for user in state.prefixes.users(block)})
    return list(found.values())


def leave(state: "SchedulerState", request: Request) -> dict[int, Releasing]:
    """The request uses its shared blocks no more. Returns what the daemon has to forget."""
    shared, table = request.shared, request.table
    ended: dict[int, Releasing] = {}
    unused = state.prefixes.leave(request)
    for index, block in enumerate(shared):
        if table[index] != NO_BLOCK:
            _unname(block, request)
            if block.num_users and not block.device_refs:
                _drop(state, block)
    for block in unused:
        _forget(state, block, ended)
    state.total_blocks -= len(unused)
    return ended


def _forget(state: "SchedulerState", block: SharedBlock, ended: dict[int, Releasing]) -> None:
    """Nobody uses it: free on the device, unless a copy touches it, and soon on the host."""
    ready_after = block.last_step
    touched: list[int] = []
    if not _is_staged(state, block):  # else its step may never be planned
        ready_after = max(ready_after, block.load_step)
    if block.device != NO_BLOCK:
        if block.host == HostState.STORING or _is_staged(state, block):
            touched.append(block.device)
        else:
            state.blocks.release([block.device], ready_after)
        block.device = NO_BLOCK
    if block.host != HostState.NONE:
        state.num_storing -= block.host == HostState.STORING
        merge_into(ended, block.kv_key, Releasing(1, touched, ready_after, block.index))


def _is_staged(state: "SchedulerState", block: SharedBlock) -> bool:
    return block.load_step == state.staged_step != NO_STEP
