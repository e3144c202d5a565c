"""Ten thousand events and more of both cores, with faults, every invariant checked after each."""

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from support.long_run import LongRun, Rates

EVENTS = 10_000
POLICIES = ("oldest-first", "pipemax", "fcfs", "count-balanced", "static-prefetch:0.2")
MOST_ROTATIONS = 10
"""Rotations that a request may wait for its turn; 3.6 was the most of 200 runs with the default
policy and `pipemax`. `fcfs` looks at nobody's wait and is left out."""
MOST_STANDSTILL = 1.5
"""Rotations per token of the longest request in which the queue for admission may stand still, that
is until somebody finishes; 0.44 was the most of 200 runs."""


@settings(
    max_examples=4,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # shrinking would take minutes
)
@given(
    seed=st.integers(0, 2**32),
    stages=st.integers(1, 4),
    slots=st.sampled_from([None, None, 1, 5]),
    block_size=st.sampled_from([2, 4, 8]),
    blocks=st.integers(8, 48),
    host=st.sampled_from([0, 3, 20, 100]),
    piece_blocks=st.sampled_from([1, 3, 100]),
    max_num_seqs=st.sampled_from([2, 8]),
    max_num_batched_tokens=st.sampled_from([4, 32]),
    link_blocks=st.sampled_from([None, 0.5, 4.0]),
    policy=st.sampled_from(POLICIES),
    prefill=st.sampled_from(["mixed", "phases"]),
    most_unfinished=st.sampled_from([3, 12, 24]),
    rates=st.builds(
        Rates,
        death=st.sampled_from([0, 0.002]),
        cancel=st.sampled_from([0, 0.005]),
        hold=st.sampled_from([0, 0.01]),
        again=st.sampled_from([0, 0.02]),
    ),
)
def test_nothing_is_lost_and_nobody_starves(
    seed: int, policy: str, rates: Rates, most_unfinished: int, **shape: object
) -> None:
    world = LongRun(seed, rates, most_unfinished=most_unfinished, policy=policy, **shape)
    world.run(EVENTS)
    assert world.events >= EVENTS
    world.check_results()
    assert policy == "fcfs" or world.longest_wait < MOST_ROTATIONS
    assert world.longest_standstill < MOST_STANDSTILL
