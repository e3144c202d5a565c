"""The last stage's sampler: a step's logits to tokens, by the rules that requests brought along."""

from collections.abc import Sequence

import torch

from pipemax.proto.errors import InvariantError
from pipemax.proto.messages.control import SampleRow, StepPlan
from pipemax.stage_worker.sampling.draw import sample
from pipemax.stage_worker.sampling.rules import TokenRules


class Sampler:
    """Keeps the rules of requests that have any, from their first row of an epoch on.

    Of a request's rows, each is sampled once, in order: what is sampled counts as its output, as
    it does at the coordinator, or the epoch ends and all rules are sent again.
    """

    def __init__(self) -> None:
        self._epoch = -1
        self._rules: dict[int, TokenRules] = {}
        """By request."""

    @property
    def num_kept(self) -> int:
        """Requests whose rules are kept."""
        return len(self._rules)

    def sample(
        self, plan: StepPlan, logits: torch.Tensor, indices: Sequence[int] | None = None
    ) -> list[int]:
        """One token id per row of `logits`, float32 `[rows, vocab]`, which is left as it was.
        `indices`: of the plan's sample rows, those whose logits these are; None for all.

        See `draw.sample`. Raises InvariantError when the plan and the rules kept contradict each
        other."""
        rows = plan.sample if indices is None else [plan.sample[index] for index in indices]
        self._forget(plan)
        ruled = [(index, row, self._rules_of(row)) for index, row in enumerate(rows) if row.extras]
        if not ruled:
            return sample(logits, rows)
        logits = logits.clone()
        for index, row, rules in ruled:
            rules.apply(logits[index].numpy(), row.banned_token_ids)
        tokens = sample(logits, rows)
        for index, _, rules in ruled:
            rules.append(tokens[index])
        return tokens

    def _forget(self, plan: StepPlan) -> None:
        if plan.epoch != self._epoch:
            self._epoch = plan.epoch
            self._rules.clear()
        for request in plan.ended:
            self._rules.pop(request, None)

    def _rules_of(self, row: SampleRow) -> TokenRules:
        assert row.extras is not None
        request, sent = row.extras.request, row.extras.rules
        if sent is not None:
            self._rules[request] = TokenRules(sent)
        rules = self._rules.get(request)
        if rules is None:
            raise InvariantError(f"request {request} is sampled, and its rules were never sent")
        if rules.num_outputs != row.position:
            raise InvariantError(
                f"request {request} has {row.position} output tokens, its rules {rules.num_outputs}"
            )
        return rules
