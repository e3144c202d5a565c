"""The scheduling core against a world in which KV really moves and really is overwritten."""

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.scheduler_world import World, expected_output

EOS = frozenset({7})


def make_requests(
    world: World, count: int, longest_prompt: int, longest_output: int
) -> Iterator[tuple[int, list[int], int]]:
    capacity = (world.num_blocks - 1) * world.size
    for key in range(count):
        output = world.random.randint(1, longest_output)
        prompt_len = min(world.random.randint(1, longest_prompt), capacity - output)
        yield key, [world.random.randrange(100) for _ in range(prompt_len)], output


def run_to_end(world: World, most_events: int = 200_000) -> None:
    for _ in range(most_events):
        if not world.step():
            return
    raise AssertionError("the world does not come to rest")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**32),
    stages=st.integers(1, 4),
    block_size=st.sampled_from([1, 4, 8]),
    blocks=st.integers(12, 60),
    host=st.sampled_from([0, 3, 20, 1000]),
    count=st.integers(1, 20),
    losses=st.integers(0, 4),
    cancels=st.integers(0, 4),
)
def test_every_request_finishes_once_with_the_right_tokens(
    seed: int,
    stages: int,
    block_size: int,
    blocks: int,
    host: int,
    count: int,
    losses: int,
    cancels: int,
) -> None:
    world = World(seed, stages=stages, blocks=blocks, host=host, block_size=block_size)
    capacity = (blocks - 1) * block_size
    requests = list(make_requests(world, count, min(60, capacity // 2), min(30, capacity // 2)))
    todo = list(requests)
    faults = ["lose"] * losses + ["cancel"] * cancels
    cancelled = set()
    busy = True
    while todo or busy:
        if todo and world.random.random() < 0.2:
            world.submit(*todo.pop())
        if faults and world.random.random() < 0.02:
            if faults.pop() == "lose":
                world.lose(stage=world.random.choice([None, *range(stages)]))
            else:
                cancelled.add(world.random.randrange(count))
                world.cancel(max(cancelled))
        busy = world.step()
    assert set(world.finished) == {key for key, _, _ in requests}
    for key, prompt, output in requests:
        result = world.finished[key]
        expected = expected_output(prompt, output, EOS)
        if result.finish_reason == "abort":
            assert key in cancelled
            assert list(result.output_token_ids) == expected[: len(result.output_token_ids)]
        else:
            assert list(result.output_token_ids) == expected
            assert result.finish_reason == ("stop" if expected[-1] in EOS else "length")
    state = world.scheduler.state
    assert state.blocks.num_free == blocks
    assert state.host_used == 0
    assert not world.host


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_most_context_is_prefetched_when_the_pool_is_small(stages: int) -> None:
    world = World(1, stages=stages, blocks=48, host=4000, block_size=8)
    for key, prompt, output in make_requests(world, 24, 150, 60):
        world.submit(key, prompt, output)
    run_to_end(world)
    counters = world.scheduler.state.counters
    assert len(world.finished) == 24
    assert counters.decode_prefetched_tokens >= 0.5 * counters.decode_context_tokens


def test_nothing_is_stored_while_the_device_pool_is_large_enough() -> None:
    world = World(1, stages=2, blocks=400, host=4000, block_size=8)
    for key, prompt, output in make_requests(world, 10, 100, 40):
        world.submit(key, prompt, output)
    run_to_end(world)
    assert len(world.finished) == 10
    assert world.loaded_blocks == 0
    assert world.scheduler.state.counters.preemptions == 0


def test_without_a_host_pool_requests_are_recomputed_and_still_right() -> None:
    world = World(3, stages=2, blocks=30, host=0, block_size=4)
    requests = list(make_requests(world, 12, 40, 40))
    for request in requests:
        world.submit(*request)
    run_to_end(world)
    for key, prompt, output in requests:
        assert list(world.finished[key].output_token_ids) == expected_output(prompt, output, EOS)
    assert world.scheduler.state.counters.preemptions > 0
