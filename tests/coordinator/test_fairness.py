"""Who gets a turn, and what is kept where: cases that random driving meets too rarely."""

from pipemax.proto.messages.ingest import SamplingParams
from support.scheduler_world import World


def request(key: int, prompt_len: int, outputs: int) -> tuple[int, list[int], SamplingParams]:
    return key, list(range(prompt_len)), SamplingParams(max_tokens=outputs, ignore_eos=True)


def test_a_stream_of_newcomers_does_not_keep_a_running_request_waiting() -> None:
    world = World(0, stages=1, blocks=40, host=0, block_size=4, max_num_seqs=1)
    world.submit(*request(0, 8, 6))
    for key in range(1, 600):
        if 0 in world.finished:
            break
        # Prompts of one token go straight to the decoding requests.
        world.submit(*request(key, 1, 1))
        world.step()
    assert 0 in world.finished


def test_a_slow_link_does_not_empty_the_device_pool() -> None:
    world = World(1, stages=2, blocks=100, host=4000, block_size=4, link_blocks=2)
    for key in range(30):
        world.submit(*request(key, 30 + key, 30))
    used: list[int] = []
    while world.step():
        state = world.scheduler.state
        if len(state.running) >= 10:
            used.append(state.blocks.num_blocks - state.blocks.num_free)
    assert len(world.finished) == 30
    assert sum(used) / len(used) > 55, "blocks were evicted that the link cannot bring back in time"


def test_what_was_cancelled_during_a_recovery_is_not_computed_again() -> None:
    world = World(0, stages=2, blocks=40, host=0, block_size=4)
    world.submit(*request(0, 12, 9))
    while len(world.scheduler.state.running[0].tokens) < 15:
        world.step()
    assert world.scheduler.state.running[0].in_flight
    world.lose(stage=1)
    world.cancel(0)
    assert 0 not in world.finished, "its step is still on its way, as far as anybody knows"
    steps = world.scheduler.state.counters.steps
    world.come_back()
    assert world.finished[0].finish_reason == "abort"
    assert world.scheduler.state.counters.steps == steps
    assert not world.scheduler.state.waiting


def test_a_request_that_needs_no_block_runs_when_an_older_one_finds_none() -> None:
    world = World(0, stages=4, blocks=10, host=0, block_size=4)
    for key, (prompt_len, outputs) in enumerate([(4, 5), (4, 17), (8, 15), (6, 17)]):
        world.submit(*request(key, prompt_len, outputs))
    while world.step():
        pass  # the world refuses to idle while something could run
    assert len(world.finished) == 4
