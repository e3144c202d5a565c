"""Prompts that begin alike: computed once, held once, and nobody's tokens change."""

from array import array
from typing import Any

from pipemax.coordinator.events import Cancelled
from pipemax.coordinator.prefixes import PrefixTree
from pipemax.coordinator.request import NO_BLOCK, HostState, Request
from pipemax.proto.messages.ingest import SamplingParams
from support.scheduler_world import VOCAB, World, expected_output

SIZE = 4
COMMON = [(7 * i + 3) % VOCAB for i in range(10 * SIZE)]


def sampling(max_tokens: int = 6, **fields: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, ignore_eos=True, **fields)


def make(key: int, prompt: list[int], **fields: Any) -> Request:
    request = Request(key, prompt, sampling(**fields), seed=0, now=0.0)
    request.forget_kv(kv_key=100 + key)
    return request


def enter(tree: PrefixTree, request: Request, num_blocks: int) -> None:
    chain = tree.match(request)
    tree.grow(chain, request, array("i", range(len(chain), num_blocks)))
    request.shared = chain
    tree.enter(request)


def world(**settings: Any) -> World:
    return World(
        1,
        **{
            "stages": 2,
            "blocks": 60,
            "host": 0,
            "block_size": SIZE,
            "share_prefixes": True,
            **settings,
        },
    )


def finish(world: World, prompts: dict[int, list[int]], most_events: int = 100_000) -> None:
    """Runs until all is done, and checks every token."""
    for _ in range(most_events):
        if not world.step():
            break
    assert set(world.finished) == set(prompts)
    for key, prompt in prompts.items():
        max_tokens = len(world.finished[key].output_token_ids)
        output, _ = expected_output(prompt, sampling(max_tokens), world.max_model_len)
        assert list(world.finished[key].output_token_ids) == output
    assert world.scheduler.state.blocks.num_free == world.num_blocks
    assert not world.scheduler.state.prefixes.num_blocks


def test_the_tree_finds_the_longest_common_beginning_of_whole_blocks() -> None:
    tree = PrefixTree(SIZE)
    first = make(1, COMMON[: 3 * SIZE + 1])
    enter(tree, first, 3)
    assert tree.match(make(2, [*COMMON[: 2 * SIZE], 0, 0, 0, 0, 0])) == first.shared[:2]
    assert tree.match(make(3, COMMON[: 2 * SIZE])) == first.shared[:1], "one token is left over"
    assert tree.match(make(4, [VOCAB, *COMMON[1:]])) == []
    assert tree.match(make(5, [*COMMON[SIZE : 3 * SIZE], 0])) == [], "the same block further on"
    assert tree.match(make(6, COMMON, prompt_logprobs=0)) == [], "all its logits are wanted"


def test_a_block_stays_in_the_tree_until_its_last_user_leaves() -> None:
    tree = PrefixTree(SIZE)
    first, second = make(1, COMMON[: 3 * SIZE + 1]), make(2, [*COMMON[: 2 * SIZE], 0, 0, 0, 0, 0])
    enter(tree, first, 3)
    enter(tree, second, 3)
    shared, branch = list(first.shared), second.shared[2]
    assert (tree.num_blocks, tree.num_references, tree.num_saved) == (4, 6, 2)
    assert {r.key for r in tree.users(shared[1])} == {1, 2}
    assert {r.key for r in tree.users(shared[2])} == {1}
    assert tree.leave(first) == [shared[2]]
    assert (branch.kv_key, branch.index) == (102, 2)
    assert (shared[0].kv_key, tree.find(101, 0)) == (101, shared[0]), "keeps its name"
    assert tree.leave(second) == [branch, shared[1], shared[0]], "deepest first"
    assert tree.num_blocks == tree.num_references == 0
    assert tree.find(101, 0) is None


def test_a_common_prompt_is_computed_once() -> None:
    one = world()
    prompts = {key: [*COMMON, key] for key in range(12)}
    for key, prompt in prompts.items():
        one.submit(key, prompt, sampling())
    finish(one, prompts)
    counters = one.scheduler.state.counters
    total = sum(map(len, prompts.values()))
    assert counters.prompt_tokens == counters.prefix_query_tokens == total
    assert counters.prompt_tokens - counters.prefix_hit_tokens == len(COMMON) + 12


def test_without_sharing_it_is_computed_for_each() -> None:
    one = world(share_prefixes=False, blocks=200)
    prompts = {key: [*COMMON, key] for key in range(4)}
    for key, prompt in prompts.items():
        one.submit(key, prompt, sampling())
    finish(one, prompts)
    assert one.scheduler.state.counters.prefix_hit_tokens == 0
    assert one.scheduler.state.counters.prefix_query_tokens == 0


def test_choices_of_one_prompt_share_it() -> None:
    one = world()
    one.submit(0, COMMON, sampling(n=5))
    finish(one, dict.fromkeys(range(5), COMMON))
    counters = one.scheduler.state.counters
    assert counters.prompt_tokens - counters.prefix_hit_tokens == len(COMMON) + 4 * SIZE


def test_what_is_shared_takes_room_once() -> None:
    """Twelve requests of ten common blocks and one of their own fit where five would not."""
    one = world(blocks=30)
    for key in range(12):
        one.submit(key, [*COMMON, key], sampling(12))
    state = one.scheduler.state
    while len(state.running) < 12:
        assert not one.finished
        assert one.step()
    assert state.total_blocks <= 10 + 2 * 12
    assert state.prefixes.num_saved == 11 * 10
    finish(one, {key: [*COMMON, key] for key in range(12)})


def test_who_waits_for_a_filler_goes_on_when_that_one_is_cancelled() -> None:
    one = world(max_num_batched_tokens=6)  # not a multiple of a block
    prompts = {key: [*COMMON, key] for key in range(3)}
    for key, prompt in prompts.items():
        one.submit(key, prompt, sampling())
    state = one.scheduler.state
    while len(state.running) < 3:
        assert one.step()
    half_way = state.running[0].planned
    assert 0 < half_way < len(COMMON)
    assert state.running[1].planned <= half_way
    one.tell(Cancelled(0))
    finish(one, {**prompts})
    assert one.finished[0].finish_reason == "abort"
    assert one.finished[1].finish_reason == "length"


def test_a_shared_block_is_stored_once_and_loaded_once() -> None:
    """Two requests of the same prompt on one stage: neither stays on the device for the other."""
    one = world(blocks=26, host=400, max_num_seqs=2, policy="oldest-first")
    groups = [[(x + g) % VOCAB for x in COMMON] for g in range(6)]
    prompts = {2 * g + i: [*groups[g], i] for g in range(6) for i in range(2)}
    for key, prompt in prompts.items():
        one.submit(key, prompt, sampling(24))
    stored: set[tuple[int, int]] = set()
    while one.step():
        stored |= one.host.keys()
    assert one.loaded_blocks
    owners = {kv_key for kv_key, index in stored if index < len(COMMON) // SIZE}
    assert owners
    assert len(owners) <= 6 + one.scheduler.state.counters.preemptions, "one of each pair owns them"
    finish(one, prompts)


def test_blocks_of_many_users_stay_on_the_device() -> None:
    one = world(blocks=34, host=400, policy="oldest-first", max_num_seqs=4)
    prompts = {key: [*COMMON, *range(key, key + 9)] for key in range(10)}
    for key, prompt in prompts.items():
        one.submit(key, prompt, sampling(30))
    state = one.scheduler.state
    seen_off_device = False
    while one.step():
        for request in state.running.values():
            seen_off_device |= NO_BLOCK in request.table[10:]
            if len(state.running) > 2 and request.shared and request.shared[0].num_users > 2:
                assert all(block.device != NO_BLOCK for block in request.shared[:1])
    assert seen_off_device
    finish(one, prompts)


def test_shared_blocks_outlive_the_request_that_named_them() -> None:
    """And the daemon is told to forget the rest of its blocks only."""
    one = world(host=200, blocks=24, policy="oldest-first", stages=1)
    prompts = {0: [*COMMON, 1], **{key: [*COMMON, key, *range(8)] for key in range(1, 8)}}
    one.submit(0, prompts[0], sampling(9))
    for key in range(1, 8):
        one.submit(key, prompts[key], sampling(20))
    state = one.scheduler.state
    name = state.running[0].kv_key
    while 0 not in one.finished:
        assert one.step()
    block = state.prefixes.find(name, 0)
    assert block is not None
    assert name not in state.by_kv_key
    assert block.host != HostState.NONE or block.device != NO_BLOCK
    finish(one, prompts)
