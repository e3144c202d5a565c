"""The books themselves, move by move."""

from pipemax.coordinator import invariants
from pipemax.coordinator.device_blocks import DeviceBlocks
from pipemax.coordinator.request import HostState, Request
from pipemax.coordinator.state import SchedulerLimits, SchedulerState
from pipemax.proto.messages.ingest import SamplingParams

BLOCK_SIZE = 4
LIMITS = SchedulerLimits(
    block_size=BLOCK_SIZE,
    num_slots=2,
    max_num_seqs=8,
    max_num_batched_tokens=64,
    max_model_len=64,
    eos_token_ids=frozenset(),
)


def test_blocks_of_a_prefetch_that_was_given_up_still_belong_to_the_step_that_reads_them() -> None:
    state = SchedulerState(LIMITS, num_host_blocks=10, blocks=DeviceBlocks(4))
    request = Request(1, list(range(9)), SamplingParams(max_tokens=4), seed=0, now=0.0)
    state.admit(request, 0.0)
    state.extend_table(request, state.blocks.take_for_write(2) or [])
    request.planned = request.computed = 2 * BLOCK_SIZE
    request.host = bytearray([HostState.STORED] * 2)
    state.host_used = 2
    assert state.evict(request) == 2

    read_by_step_9 = state.blocks.take_for_write(4) or []
    state.blocks.release(read_by_step_9, ready_after=9)
    blocks, after = state.blocks.take_for_copy(2, latest_step=9) or ([], -1)
    state.load_into(request, blocks, 11, after)
    invariants.check(state)

    assert state.forget_kv(request), "the daemon must say when no copy touches them"
    state.released(request.kv_key)
    assert state.blocks.num_free == 4
    assert state.blocks.num_ready(latest_step=8) == 0
    invariants.check(state)
