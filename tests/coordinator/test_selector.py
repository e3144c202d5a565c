"""The selector against the exact optimum of small instances, and its promises on any instance."""

import dataclasses
import random
import statistics

from hypothesis import given
from hypothesis import strategies as st

from pipemax.coordinator.cost_model import LinearCost
from pipemax.coordinator.selector import Candidate, SelectionProblem, select
from support.exact_selector import random_problem, regret_share, solve_exactly

INSTANCES = 500


def test_regret_against_the_exact_optimum() -> None:
    """Acceptance: never infeasible; regret as a share of the budget and of T*: median at most 1 %,
    95th percentile at most 3 %; better than greedy on 80 % of where that is not optimal."""
    shares, greedy_not_best, better = [], 0, 0
    for seed in range(INSTANCES):
        problem = random_problem(random.Random(seed))
        optimum = solve_exactly(problem)
        selection = select(problem)
        check_feasible(problem, optimum.forced)
        assert selection.objective >= optimum.objective - 1e-9
        shares.append(regret_share(problem, selection.objective - optimum.objective))
        if selection.greedy_objective > optimum.objective + 1e-9:
            greedy_not_best += 1
            better += selection.objective < selection.greedy_objective - 1e-9
    assert statistics.median(shares) <= 0.01
    assert statistics.quantiles(shares, n=20)[-1] <= 0.03
    assert greedy_not_best > INSTANCES // 4
    assert better >= 0.8 * greedy_not_best


def check_feasible(problem: SelectionProblem, forced: frozenset[int] = frozenset()) -> None:
    for refine in (False, True):
        selection = select(problem, refine)
        chosen = [*selection.host, *selection.device]
        keys = [c.key for c in chosen]
        assert len(set(keys)) == len(keys)
        assert set(selection.host) <= set(problem.host)
        assert set(selection.device) <= set(problem.device)
        load = sum(c.load_blocks for c in selection.host)
        assert load <= max(0, min(problem.budget_blocks, problem.staging_blocks))
        assert len(chosen) <= problem.max_requests
        assert forced <= set(keys)
        context = sum(c.context_tokens for c in chosen)
        assert selection.objective == problem.objective(load, len(chosen), context)
        assert selection.objective <= selection.greedy_objective


candidates = st.tuples(st.integers(-1, 60), st.integers(0, 300), st.integers(0, 5000))


@given(
    st.lists(candidates, max_size=60),
    st.lists(candidates, max_size=40),
    st.integers(-3, 2000),
    st.integers(-3, 2000),
    st.integers(0, 50),
    st.tuples(st.floats(0, 1), st.floats(0, 1e-3), st.floats(0, 1e-5)),
    st.floats(0, 2),
    st.floats(0, 1e6),
    st.integers(1, 80),
)
def test_any_instance_gets_a_feasible_answer(
    host: list[tuple[int, int, int]],
    device: list[tuple[int, int, int]],
    budget: int,
    staging: int,
    most: int,
    cost: tuple[float, float, float],
    target_s: float,
    blocks_per_s: float,
    overdue_after: int,
) -> None:
    problem = SelectionProblem(
        host=[Candidate(key, *one) for key, one in enumerate(host)],
        device=[Candidate(1000 + key, *one) for key, one in enumerate(device)],
        budget_blocks=budget,
        staging_blocks=staging,
        max_requests=most,
        cost=LinearCost(*cost),
        target_s=target_s,
        blocks_per_s=blocks_per_s,
        turn=61,
        overdue_after=overdue_after,
    )
    check_feasible(problem)


@given(st.integers(0, 2**32))
def test_the_answer_does_not_depend_on_the_order_of_candidates(seed: int) -> None:
    draw = random.Random(seed)
    problem = random_problem(draw)
    shuffled = dataclasses.replace(
        problem,
        host=draw.sample(problem.host, len(problem.host)),
        device=draw.sample(problem.device, len(problem.device)),
    )
    assert select(problem) == select(shuffled)


def problem_of(host: list[Candidate], **changes: object) -> SelectionProblem:
    """Without device-resident requests and with an imbalance term that weighs nothing."""
    values: dict[str, object] = {
        "host": host,
        "device": [],
        "budget_blocks": 100,
        "staging_blocks": 100,
        "max_requests": 100,
        "cost": LinearCost(0.02, 1e-5, 1e-7),
        "target_s": 0.02,
        "blocks_per_s": 0.0,
        "turn": 100,
        "overdue_after": 50,
    } | changes
    return SelectionProblem(**values)  # type: ignore[arg-type]


def test_refinement_fills_what_greedy_leaves() -> None:
    host = [Candidate(0, 60, 70, 0), Candidate(1, 61, 60, 0), Candidate(2, 62, 40, 0)]
    selection = select(problem_of(host))
    assert selection.greedy_objective == 30
    assert selection.objective == 0
    assert {c.key for c in selection.host} == {1, 2}


def test_an_overdue_request_is_kept_though_others_would_fit_better() -> None:
    host = [Candidate(0, 50, 70, 0), Candidate(1, 61, 60, 0), Candidate(2, 62, 40, 0)]
    assert [c.key for c in select(problem_of(host)).host] == [0]


def test_nothing_is_loaded_past_an_overdue_request_that_does_not_fit_yet() -> None:
    host = [Candidate(0, 50, 170, 0), Candidate(1, 61, 60, 0)]
    assert select(problem_of(host)).host == ()
    assert [c.key for c in select(problem_of(host, overdue_after=51)).host] == [1]


def test_device_resident_requests_even_out_the_time() -> None:
    device = [Candidate(key, 90, 0, 1000 * (key + 1)) for key in range(4)]
    cost = LinearCost(0.01, 0.0, 1e-6)
    problem = problem_of([], device=device, cost=cost, target_s=0.016, blocks_per_s=1e4)
    chosen = select(problem).device
    assert sum(c.context_tokens for c in chosen) == 6000


def test_nobody_waits_longer_than_the_bound() -> None:
    """Hundreds of turns with requests from tiny to three times one turn's budget: the wait stays
    within the time to become overdue and one rotation of all others."""
    draw = random.Random(5)
    size = {key: draw.choice([2, 5, 9, 30, 77, 150]) for key in range(60)}
    last = dict.fromkeys(size, -1)
    budget, overdue_after, credit, longest = 50, 60, 0, 0
    for turn in range(1200):
        credit = min(credit + budget, max(budget, *size.values()))
        host = [Candidate(key, last[key], size[key], 16 * size[key]) for key in size]
        chosen = select(
            problem_of(
                host,
                budget_blocks=credit,
                staging_blocks=200,
                turn=turn,
                overdue_after=overdue_after,
                target_s=0.0203,
                blocks_per_s=budget / 0.02,
            )
        ).host
        for candidate in chosen:
            longest = max(longest, turn - last[candidate.key])
            last[candidate.key] = turn
        credit -= sum(c.load_blocks for c in chosen)
    rotation = sum(size.values()) // budget + 1
    longest = max(longest, *(turn - one for one in last.values()))
    assert longest <= overdue_after + 2 * rotation
