"""The coordinator's core and the KV daemon's core together, with deaths at any time."""

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipemax.proto.messages.ingest import SamplingParams
from support.scheduler_world import VOCAB, expected_output
from support.two_cores_world import TwoCores

MOST_EVENTS = 100_000


def drive(world: TwoCores, count: int, deaths: int, cancels: int, alike: float = 0.0) -> None:
    """Submits `count` requests, kills and cancels in between, and checks every token. `alike`: of
    how many the prompts begin the same, for a length of their own."""
    draw = world.random
    longest = world.max_model_len // 2
    requests = {
        key: (
            [draw.randrange(VOCAB) for _ in range(draw.randint(1, min(60, longest)))],
            SamplingParams(max_tokens=draw.randint(1, min(40, longest)), ignore_eos=True),
        )
        for key in range(count)
    }
    begin = [draw.randrange(VOCAB) for _ in range(longest)]
    for prompt, _ in requests.values():
        if draw.random() < alike:
            same = draw.choice([len(prompt), draw.randint(0, len(prompt))])
            prompt[:same] = begin[:same]
    todo, cancelled, busy = list(requests), set[int](), True
    while todo or busy:
        assert world.events < MOST_EVENTS, "the world does not come to rest"
        if todo and draw.random() < 0.1:
            key = todo.pop()
            world.submit(key, *requests[key])
        if deaths and draw.random() < 0.005:
            deaths -= 1
            victim = draw.randint(-1, len(world.stages) - 1)
            if victim < 0:
                world.kill_daemon()
            else:
                world.kill_stage(victim)
        if cancels and draw.random() < 0.005:
            cancels -= 1
            cancelled.add(draw.randrange(count))
            world.cancel(max(cancelled))
        busy = world.step()
    assert set(world.finished) == set(requests)
    for key, (prompt, sampling) in requests.items():
        result = world.finished[key]
        output, reason = expected_output(prompt, sampling, world.max_model_len)
        if key in cancelled and result.finish_reason == "abort":
            output, reason = output[: len(result.output_token_ids)], "abort"
        assert (list(result.output_token_ids), result.finish_reason) == (output, reason)
    check_nothing_is_left(world)


def check_nothing_is_left(world: TwoCores) -> None:
    state = world.scheduler.state
    assert state.blocks.num_free == world.num_blocks
    assert state.host_used == 0
    assert not state.releasing
    assert world.daemon is not None
    assert world.daemon.host_blocks_used == 0
    assert not world.daemon.busy


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**32),
    stages=st.integers(1, 4),
    block_size=st.sampled_from([1, 4, 8]),
    blocks=st.integers(6, 60),
    host=st.sampled_from([0, 3, 20, 200]),
    piece_blocks=st.sampled_from([1, 3, 100]),
    count=st.integers(1, 16),
    deaths=st.integers(0, 5),
    cancels=st.integers(0, 4),
    alike=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_tokens_are_right_whatever_happens_when(
    seed: int,
    stages: int,
    block_size: int,
    blocks: int,
    host: int,
    piece_blocks: int,
    count: int,
    deaths: int,
    cancels: int,
    alike: float,
) -> None:
    world = TwoCores(
        seed,
        stages=stages,
        blocks=blocks,
        host=host,
        block_size=block_size,
        piece_blocks=piece_blocks,
        share_prefixes=True,
    )
    drive(world, count, deaths, cancels, alike)
