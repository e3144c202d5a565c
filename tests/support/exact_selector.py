"""The selector's problem solved by looking at every selection, and random small instances of it."""

import random
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipemax.coordinator.cost_model import LinearCost
from pipemax.coordinator.selector import Candidate, SelectionProblem

Sums = tuple[int, int, int]
"""Blocks, requests, context tokens."""


@dataclass(frozen=True)
class Optimum:
    objective: float
    """Blocks."""
    forced: frozenset[int]
    """Keys that every feasible selection holds: the overdue ones."""


def solve_exactly(problem: SelectionProblem) -> Optimum:
    """The least objective over all feasible selections; at most about 12 candidates of a kind."""
    forced_host, blocked = _overdue(problem, problem.host, problem.max_requests, loads=True)
    places = problem.max_requests - len(forced_host)
    forced_device, _ = _overdue(problem, problem.device, places, loads=False)
    free_host = [] if blocked else [c for c in problem.host if c not in forced_host]
    free_device = [c for c in problem.device if c not in forced_device]
    base = _sums([*forced_host, *forced_device])
    base = (sum(c.load_blocks for c in forced_host), base[1], base[2])
    # Device subsets by the number of requests, each number's by context: the best one beside a
    # given host subset has the context next to the one missing.
    by_count: dict[int, list[int]] = {}
    for _, count, tokens in _subset_sums(free_device):
        by_count.setdefault(count, []).append(tokens)
    for tokens_list in by_count.values():
        tokens_list.sort()
    best = float("inf")
    for load, count, tokens in _subset_sums(free_host):
        blocks, requests, context = base[0] + load, base[1] + count, base[2] + tokens
        if blocks > problem.room_blocks and load:
            continue
        for more, contexts in by_count.items():
            if requests + more > problem.max_requests:
                continue
            for index in _near(problem, requests + more, context, contexts):
                value = problem.objective(blocks, requests + more, context + contexts[index])
                best = min(best, value)
    return Optimum(best, frozenset(c.key for c in [*forced_host, *forced_device]))


def random_problem(draw: random.Random) -> SelectionProblem:
    """Up to 8 host-resident and 6 device-resident requests of lognormal lengths, budgets from far
    too small to more than enough, an imbalance term from light to heavy."""
    turn = 100
    host = [_candidate(draw, key, turn, on_host=True) for key in range(draw.randint(1, 8))]
    device = [_candidate(draw, 100 + key, turn, on_host=False) for key in range(draw.randint(0, 6))]
    everything = sum(c.load_blocks for c in host)
    budget = max(1, round(everything * draw.uniform(0.2, 1.1)))
    cost = LinearCost(draw.uniform(0.005, 0.05), draw.uniform(0, 5e-4), draw.uniform(1e-7, 3e-6))
    count = len(host) + len(device)
    context = sum(c.context_tokens for c in [*host, *device])
    share = draw.uniform(0.3, 0.9)
    target_s = cost.time_s(round(share * count), round(share * context))
    return SelectionProblem(
        host=host,
        device=device,
        budget_blocks=budget,
        staging_blocks=round(budget * draw.uniform(0.8, 2.0)),
        max_requests=draw.choice([count, draw.randint(1, count)]),
        cost=cost,
        target_s=target_s,
        blocks_per_s=budget / target_s * draw.uniform(0.3, 3.0),
        turn=turn,
        overdue_after=draw.choice([30, 60, 1000]),
    )


def _candidate(draw: random.Random, key: int, turn: int, on_host: bool) -> Candidate:
    context = max(16, min(4096, round(draw.lognormvariate(6, 1))))
    last_turn = turn - draw.randint(1, 64)
    return Candidate(key, last_turn, context // 16 if on_host else 0, context)


def _overdue(
    problem: SelectionProblem, candidates: Sequence[Candidate], places: int, *, loads: bool
) -> tuple[list[Candidate], bool]:
    forced: list[Candidate] = []
    room = problem.room_blocks
    for candidate in sorted(candidates, key=lambda c: (c.last_turn, c.key)):
        if problem.turn - candidate.last_turn < problem.overdue_after or len(forced) == places:
            break
        if loads and candidate.load_blocks > room:
            return forced, True
        room -= candidate.load_blocks if loads else 0
        forced.append(candidate)
    return forced, False


def _sums(candidates: Sequence[Candidate]) -> Sums:
    return (
        sum(c.load_blocks for c in candidates),
        len(candidates),
        sum(c.context_tokens for c in candidates),
    )


def _subset_sums(candidates: Sequence[Candidate]) -> list[Sums]:
    sums: list[Sums] = [(0, 0, 0)]
    for c in candidates:
        sums += [(b + c.load_blocks, n + 1, t + c.context_tokens) for b, n, t in sums]
    return sums


def _near(
    problem: SelectionProblem, requests: int, context: int, contexts: list[int]
) -> Iterator[int]:
    """Indices on both sides of the context with which the step would take just `target_s`."""
    missing_s = problem.target_s - problem.cost.time_s(requests, context)
    index = bisect_left(contexts, missing_s / problem.cost.per_token_s)
    yield from (i for i in (index - 1, index) if 0 <= i < len(contexts))


def regret_share(problem: SelectionProblem, regret_blocks: float) -> float:
    """Of the smaller of the budget and of what the link carries in `target_s`: bounds the share of
    the budget and, the regret taken as time, the share of T*."""
    unit = min(problem.budget_blocks, problem.blocks_per_s * problem.target_s)
    return max(0.0, regret_blocks) / unit
