"""Which requests take part in a step: the interface, and the policies by name.

A policy is pure and deterministic. It is asked twice per step: one turn ahead, which host-resident
requests to prefetch; and at planning, which device-resident ones to add.

- `oldest-first`: fill the prefetch budget with who waited longest, then even out request counts.
- `pipemax`: the two-stage greedy selector of `selector.py` over the same budget, even step times,
  prompts included; and no more KV on the host than makes the pipeline faster. The default.
- `fcfs`: by order of arrival, even counts; who came first finishes first.
- `count-balanced`: no slot gets more than an even count of requests, whatever their context. The
  rule of TD-Pipe, which has no prefetch, carried over to one.
- `static-prefetch:<fraction>`: up to that fraction of the device blocks in every step, whatever
  the link can carry; even counts. What the paper compares its budget with.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from pipemax.coordinator.candidates import Candidate as Candidate
from pipemax.coordinator.candidates import Ints, Some, columns_of
from pipemax.coordinator.cost_model import LinearCost, PipelineCost, StepFeatures
from pipemax.coordinator.offload_gain import OffloadOutlook as OffloadOutlook
from pipemax.coordinator.offload_gain import worth_offloading
from pipemax.coordinator.prefill_pacing import balanced_chunk
from pipemax.coordinator.selector import SelectionProblem, select
from pipemax.proto.errors import ConfigError

DEFAULT_POLICY = "pipemax"
MIN_OVERDUE_TURNS = 32
"""Nobody is overdue before so many steps, however short the queue is."""
OVERDUE_ROTATIONS = 2
"""Rotations of all who wait after which one of them is overdue."""
_LEAST_COUNT_SHARE = 1e-3
"""Least share of T* that the requests' count is given: where nothing but the weights costs time,
all selections would take equally long, and the counts should still be even."""
_NO_LIMIT = 2**31


@dataclass(frozen=True, slots=True)
class SlotTarget:
    """A slot's even share of what can run now, and what is known of time."""

    requests: int
    context_tokens: int
    max_requests: int = _NO_LIMIT
    turn: int = 0
    """Number of the step that is being filled."""
    num_slots: int = 1
    device_blocks: int = 0
    """Blocks of the device pool."""
    block_size: int = 1
    """Tokens per block."""
    cost: LinearCost | None = None
    """Of a step of about this share; None until the stages were measured."""
    blocks_per_s: float | None = None
    """What the slowest link carries; None until it was measured."""


@dataclass(frozen=True, slots=True)
class Outlook:
    """What is expected of the step that a prefetch is for."""

    target: SlotTarget = SlotTarget(0, 0)
    residents: Some = ()
    """Device-resident requests that could run in it, as far as known."""


NO_OUTLOOK = Outlook()


class SelectionPolicy(Protocol):
    def choose_prefetch(
        self,
        candidates: Some,
        budget_blocks: int,
        free_blocks: int,
        outlook: Outlook = NO_OUTLOOK,
    ) -> list[int]:
        """Keys to prefetch. Their `load_blocks` sum to at most the free staging blocks and, unless
        the policy is about ignoring it, to at most the link's budget."""
        ...

    def choose_residents(
        self, candidates: Some, chosen: Sequence[Candidate], target: SlotTarget
    ) -> list[int]:
        """Keys of device-resident requests to run beside those already `chosen`."""
        ...

    def prefill_tokens(
        self, costs: PipelineCost, decode: StepFeatures, share: StepFeatures, most_tokens: int
    ) -> int:
        """Prompt tokens, at most `most_tokens`, for a step that decodes `decode`; `share` is the
        mean step with an even chunk."""
        ...

    def worth_offloading(self, outlook: OffloadOutlook) -> int | None:
        """Most KV that running requests should hold beyond the device pool, in blocks; None: they
        should fit on the device with all that they are expected to grow."""
        ...


class _InOrder:
    """Takes requests in an order of its own: to prefetch, as long as there is room; beside those,
    an even count. Even chunks of prompts, and all host memory in use."""

    def order(self, candidates: Some) -> Ints:
        """Indices; first come those to be served first."""
        raise NotImplementedError

    def choose_prefetch(
        self,
        candidates: Some,
        budget_blocks: int,
        free_blocks: int,
        outlook: Outlook = NO_OUTLOOK,
    ) -> list[int]:
        return _while_room(candidates, self.order(candidates), min(budget_blocks, free_blocks))

    def choose_residents(
        self, candidates: Some, chosen: Sequence[Candidate], target: SlotTarget
    ) -> list[int]:
        places = max(0, target.requests - len(chosen))
        keys: list[int] = columns_of(candidates).keys[self.order(candidates)[:places]].tolist()
        return keys

    def prefill_tokens(
        self, costs: PipelineCost, decode: StepFeatures, share: StepFeatures, most_tokens: int
    ) -> int:
        return min(share.prefill_tokens, most_tokens)

    def worth_offloading(self, outlook: OffloadOutlook) -> int | None:
        return _NO_LIMIT


class OldestFirst(_InOrder):
    """Fills the prefetch budget with those who waited longest, then evens out request counts.

    Nobody starves: the one who waited longest is never passed over for a later one that happens to
    be smaller.
    """

    def order(self, candidates: Some) -> Ints:
        return columns_of(candidates).by_wait()


class FirstComeFirstServed(_InOrder):
    """In order of arrival, without looking at who waited. Nobody starves: the first to come is
    always served, so it finishes, and then the next one is first."""

    def order(self, candidates: Some) -> Ints:
        return np.argsort(columns_of(candidates).keys, kind="stable")


class CountBalanced(OldestFirst):
    """Even counts only: a prefetch never brings more requests than an even share of all, those on
    the host included; contexts are not looked at."""

    def choose_prefetch(
        self,
        candidates: Some,
        budget_blocks: int,
        free_blocks: int,
        outlook: Outlook = NO_OUTLOOK,
    ) -> list[int]:
        target = outlook.target
        share = max(1, target.requests - (-len(candidates) // target.num_slots))
        order = self.order(candidates)[:share]
        return _while_room(candidates, order, min(budget_blocks, free_blocks))


class StaticPrefetch(OldestFirst):
    """A fixed share of the device pool per step, who waited longest first. The link's budget is
    ignored: that is the point of the comparison. One request may always exceed the share, or it
    would never run."""

    def __init__(self, fraction: float) -> None:
        """`fraction` of the device blocks, more than 0 and at most 1."""
        self._fraction = fraction

    def choose_prefetch(
        self,
        candidates: Some,
        budget_blocks: int,
        free_blocks: int,
        outlook: Outlook = NO_OUTLOOK,
    ) -> list[int]:
        order = self.order(candidates)
        if not len(order):
            return []
        share = int(self._fraction * outlook.target.device_blocks)
        largest = max(share, int(columns_of(candidates).load_blocks[order[0]]))
        return _while_room(candidates, order, min(free_blocks, largest))


class PipemaxPolicy:
    """The two-stage greedy selector. Until links and stages were measured there is no common unit
    for budget and time, and it does what `oldest-first` does."""

    def __init__(self) -> None:
        self._plain = OldestFirst()

    def choose_prefetch(
        self,
        candidates: Some,
        budget_blocks: int,
        free_blocks: int,
        outlook: Outlook = NO_OUTLOOK,
    ) -> list[int]:
        target = outlook.target
        candidates = columns_of(candidates)
        total = int(candidates.load_blocks.sum())
        room = min(budget_blocks, free_blocks, total)
        if target.cost is None or not target.blocks_per_s or room <= 0:
            return self._plain.choose_prefetch(candidates, budget_blocks, free_blocks)
        # The share of a slot, with what this prefetch adds to all of them together.
        brought = room / total
        requests = target.requests + brought * len(candidates) / target.num_slots
        context = target.context_tokens + room * target.block_size / target.num_slots
        cost, target_s = _cost_and_time(target.cost, requests, context)
        selection = select(
            SelectionProblem(
                host=candidates,
                device=outlook.residents,
                budget_blocks=min(budget_blocks, total),
                staging_blocks=free_blocks,
                max_requests=target.max_requests,
                cost=cost,
                target_s=target_s,
                blocks_per_s=target.blocks_per_s,
                turn=target.turn,
                overdue_after=_overdue_after(total / room),
            )
        )
        keys = selection.host_keys
        if not keys and not len(outlook.residents):
            return self._plain.choose_prefetch(candidates, budget_blocks, free_blocks)[:1]
        return keys

    def choose_residents(
        self, candidates: Some, chosen: Sequence[Candidate], target: SlotTarget
    ) -> list[int]:
        if target.cost is None:
            return self._plain.choose_residents(candidates, chosen, target)
        cost, target_s = _cost_and_time(target.cost, target.requests, target.context_tokens)
        already_s = cost.time_s(len(chosen), sum(c.context_tokens for c in chosen))
        selection = select(
            SelectionProblem(
                host=(),
                device=candidates,
                budget_blocks=0,
                staging_blocks=0,
                max_requests=max(0, target.max_requests - len(chosen)),
                cost=LinearCost(already_s, cost.per_request_s, cost.per_token_s),
                target_s=target_s,
                blocks_per_s=1.0,  # the only term: its weight does not matter
                turn=target.turn,
                overdue_after=_overdue_after(len(candidates) / max(1, target.requests)),
            )
        )
        keys = selection.device_keys
        if not keys and not chosen:
            return self._plain.choose_residents(candidates, chosen, target)[:1]
        return keys

    def prefill_tokens(
        self, costs: PipelineCost, decode: StepFeatures, share: StepFeatures, most_tokens: int
    ) -> int:
        return balanced_chunk(costs, decode, share, most_tokens)

    def worth_offloading(self, outlook: OffloadOutlook) -> int | None:
        return worth_offloading(outlook)


_POLICIES: dict[str, Callable[[], SelectionPolicy]] = {
    "pipemax": PipemaxPolicy,
    "oldest-first": OldestFirst,
    "fcfs": FirstComeFirstServed,
    "count-balanced": CountBalanced,
}
_STATIC = "static-prefetch"


def make_policy(name: str) -> SelectionPolicy:
    """The policy called `name`. Raises ConfigError for a name that is not known, and for a fraction
    that is none."""
    kind, _, fraction = name.partition(":")
    if kind == _STATIC:
        return StaticPrefetch(_fraction(fraction))
    if name not in _POLICIES:
        known = ", ".join([*_POLICIES, f"{_STATIC}:<fraction>"])
        raise ConfigError(f"--policy {name}: choose {known}")
    return _POLICIES[name]()


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise ConfigError(
            f"--policy {_STATIC}: {text!r} is not a fraction of the device blocks; "
            f"write a number above 0 and up to 1, as in {_STATIC}:0.15"
        )
    return value


def _while_room(candidates: Some, order: Ints, room: int) -> list[int]:
    """Keys of the first ones, up to the first that does not fit."""
    columns = columns_of(candidates)
    filled = np.cumsum(columns.load_blocks[order])
    keys: list[int] = columns.keys[order[: int((filled <= room).sum())]].tolist()
    return keys


def _cost_and_time(
    cost: LinearCost, requests: float, context_tokens: float
) -> tuple[LinearCost, float]:
    """The cost with a floor under what a request adds, and T* of a slot with this share."""
    floor = _LEAST_COUNT_SHARE * cost.time_s(requests, context_tokens) / max(1.0, requests)
    cost = LinearCost(cost.fixed_s, max(cost.per_request_s, floor), cost.per_token_s)
    return cost, cost.time_s(requests, context_tokens)


def _overdue_after(rotation_turns: float) -> int:
    """`rotation_turns`: steps until all who wait had their turn."""
    return MIN_OVERDUE_TURNS + int(OVERDUE_ROTATIONS * rotation_turns)
