"""The selector's time and regret: prints both.

    python ops/benchmarks/selector.py [--candidates 2000] [--rounds 300] [--instances 2000]

Time: one selection among so many candidates, three quarters of them on the host, with lognormal
lengths and the budget of one step. Several budgets, from a few requests to most of a slot; every
round is another instance. Regret: random small instances (up to 8 + 6 candidates) against the best
of all selections, as a share of the smaller of the budget and of λ·T*, so that it bounds both
shares. The instances and the exact solver are those of the tests.
"""

import argparse
import platform
import random
import statistics
import sys
import time
from pathlib import Path

from pipemax.coordinator.cost_model import LinearCost
from pipemax.coordinator.selector import Candidate, SelectionProblem, select

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from support.exact_selector import random_problem, regret_share, solve_exactly

BLOCK_SIZE = 16
SLOTS = 8


def large_problem(draw: random.Random, candidates: int, budget_share: float) -> SelectionProblem:
    """A slot's turn among `candidates` requests; the link brings `budget_share` of the slot."""
    turn = 1000
    everyone = [
        Candidate(
            key,
            turn - draw.randint(1, 4 * SLOTS),
            max(1, context // BLOCK_SIZE),
            context,
        )
        for key in range(candidates)
        for context in [max(32, round(draw.lognormvariate(6, 0.8)))]
    ]
    cost = LinearCost(0.02, 4e-5, 2e-7)
    requests = candidates // (4 * SLOTS)
    context = requests * sum(c.context_tokens for c in everyone) // candidates
    target_s = cost.time_s(requests, context)
    budget = max(1, round(budget_share * context / BLOCK_SIZE))
    return SelectionProblem(
        host=everyone[: candidates * 3 // 4],
        device=everyone[candidates * 3 // 4 :],
        budget_blocks=budget,
        staging_blocks=2 * budget,
        max_requests=256,
        cost=cost,
        target_s=target_s,
        blocks_per_s=budget / target_s,
        turn=turn,
        overdue_after=8 * SLOTS,
    )


def print_time(candidates: int, rounds: int) -> None:
    print(f"one selection among {candidates} candidates, {rounds} instances each")
    print("budget of slot | greedy us | median us | p95 us | left over, share: greedy | refined")
    for budget_share in (0.1, 0.3, 0.6, 0.9):
        draw = random.Random(0)
        problems = [large_problem(draw, candidates, budget_share) for _ in range(rounds)]
        greedy_us, whole_us, before, after = [], [], [], []
        for problem in problems:
            started = time.perf_counter()
            select(problem, refine=False)
            between = time.perf_counter()
            selection = select(problem)
            ended = time.perf_counter()
            greedy_us.append(1e6 * (between - started))
            whole_us.append(1e6 * (ended - between))
            before.append(selection.greedy_objective / problem.budget_blocks)
            after.append(selection.objective / problem.budget_blocks)
        p95 = statistics.quantiles(whole_us, n=20)[-1]
        print(
            f"{budget_share:14.0%} | {statistics.median(greedy_us):9.0f} | "
            f"{statistics.median(whole_us):9.0f} | {p95:6.0f} | "
            f"{statistics.median(before):24.3%} | {statistics.median(after):.3%}"
        )


def print_regret(instances: int) -> None:
    shares, greedy_not_best, better = [], 0, 0
    for seed in range(instances):
        problem = random_problem(random.Random(seed))
        optimum = solve_exactly(problem).objective
        selection = select(problem)
        shares.append(regret_share(problem, selection.objective - optimum))
        if regret_share(problem, selection.greedy_objective - optimum) > 1e-9:
            greedy_not_best += 1
            better += selection.objective < selection.greedy_objective - 1e-9
    quantiles = statistics.quantiles(shares, n=100)
    print(f"regret over {instances} small instances, share of the smaller of budget and λ·T*")
    print(f"  median {statistics.median(shares):.3%}, p95 {quantiles[94]:.3%}, ", end="")
    print(f"p99 {quantiles[98]:.3%}, largest {max(shares):.3%}")
    print(f"  optimal on {sum(share < 1e-9 for share in shares) / instances:.1%}")
    print(f"  better than greedy on {better} of the {greedy_not_best} where greedy is not optimal")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--candidates", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--instances", type=int, default=2000)
    arguments = parser.parse_args()
    print(f"Python {platform.python_version()}, {platform.machine()}")
    print_time(arguments.candidates, arguments.rounds)
    print_regret(arguments.instances)


if __name__ == "__main__":
    main()
