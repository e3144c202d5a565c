"""A step's logits to tokens, by the rules that requests brought along: on the last stage, or in a
sampler worker."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from pipemax.proto.errors import InvariantError
from pipemax.proto.messages.control import NO_TOKEN, RowLogprobs, SampleRow, StepPlan
from pipemax.proto.messages.types import unpack_i32
from pipemax.stage_worker.channels.logits import Shares
from pipemax.stage_worker.sampling.draw import sample
from pipemax.stage_worker.sampling.guide import Guides
from pipemax.stage_worker.sampling.logprobs import row_logprobs
from pipemax.stage_worker.sampling.rules import TokenRules


@dataclass(frozen=True, slots=True)
class Sampled:
    tokens: list[int]
    """One per row; NO_TOKEN for those of `shares`."""
    logprobs: tuple[RowLogprobs, ...] = ()
    """Of the rows that ask for them, in order."""
    shares: Shares = ()
    """Rows that samplers sample, from logits left in the ring."""


class Sampler:
    """Keeps the rules of requests that have any, from their first row of an epoch on.

    Of a request's rows, each is sampled once, in order: what is sampled counts as its output, as
    it does at the coordinator, or the epoch ends and all rules are sent again.
    """

    def __init__(self, tokenizer: Path | None = None) -> None:
        """tokenizer: the model's tokenizer.json, for grammars."""
        self._guides = Guides(tokenizer)
        self._epoch = -1
        self._rules: dict[int, TokenRules] = {}
        """By request."""

    @property
    def num_kept(self) -> int:
        """Requests whose rules are kept."""
        return len(self._rules)

    def sample(
        self, plan: StepPlan, logits: torch.Tensor, indices: Sequence[int] | None = None
    ) -> Sampled:
        """`logits` are float32 `[rows, vocab]` and left as they were. `indices`: of the plan's
        sample rows, those whose logits these are; None for all.

        See `draw.sample`. Raises InvariantError when the plan and the rules kept contradict each
        other."""
        if plan.epoch != self._epoch:
            self._epoch = plan.epoch
            self.forget_all()
        self.forget(plan.ended)
        if indices is None:
            indices = range(len(plan.sample))
        return self.sample_rows([plan.sample[index] for index in indices], logits, indices)

    def sample_rows(
        self, rows: Sequence[SampleRow], logits: torch.Tensor, indices: Sequence[int]
    ) -> Sampled:
        """Without minding the epoch. `rows` are the plan's sample rows at `indices`, and `logits`
        theirs; the rest as in `sample`."""
        if not any(row.extras for row in rows):
            return Sampled(sample(logits, rows))
        tokens = self._pick(logits, rows)
        return Sampled(tokens, row_logprobs(logits, rows, tokens, indices))

    def forget_all(self) -> None:
        """An epoch has ended."""
        self._rules.clear()

    def forget(self, ended: Iterable[int]) -> None:
        """These requests have ended."""
        for request in ended:
            self._rules.pop(request, None)

    def _pick(self, logits: torch.Tensor, rows: Sequence[SampleRow]) -> list[int]:
        """One token per row: sampled, or the row's target, or NO_TOKEN."""
        ruled: list[tuple[int, TokenRules]] = []
        targets: dict[int, int] = {}
        for index, row in enumerate(rows):
            if row.extras is not None and row.extras.target >= 0:
                targets[index] = row.extras.target
            elif row.extras is not None and row.extras.request >= 0:
                ruled.append((index, self._rules_of(row, logits.shape[1])))
        if ruled:
            logits = logits.clone()
        for index, rules in ruled:
            if not rules.apply(logits[index].numpy(), rows[index].banned_token_ids):
                targets[index] = NO_TOKEN
        tokens = _sample_but(targets, logits, rows)
        for index, rules in ruled:
            if tokens[index] != NO_TOKEN:
                rules.append(tokens[index])
        return tokens

    def _rules_of(self, row: SampleRow, vocab_size: int) -> TokenRules:
        assert row.extras is not None
        request, sent = row.extras.request, row.extras.rules
        if sent is not None:
            guide = None
            if sent.grammar:
                ends = tuple(unpack_i32(sent.end_token_ids))
                guide = self._guides.open(sent.grammar, ends, vocab_size)
            self._rules[request] = TokenRules(sent, guide)
        rules = self._rules.get(request)
        if rules is None:
            raise InvariantError(f"request {request} is sampled, and its rules were never sent")
        if rules.num_outputs != row.position:
            raise InvariantError(
                f"request {request} has {row.position} output tokens, its rules {rules.num_outputs}"
            )
        return rules


def _sample_but(
    targets: dict[int, int], logits: torch.Tensor, rows: Sequence[SampleRow]
) -> list[int]:
    """Tokens of all rows, of which `targets` are known."""
    if not targets:
        return sample(logits, rows)
    sampled = [index for index in range(len(rows)) if index not in targets]
    found = dict(targets)
    if sampled:
        tokens = sample(logits[sampled], [rows[index] for index in sampled])
        found.update(zip(sampled, tokens, strict=True))
    return [found[index] for index in range(len(rows))]
