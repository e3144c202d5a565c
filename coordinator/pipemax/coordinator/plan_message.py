"""From the items of a step to the message that goes to the stages."""

import sys
from array import array
from collections.abc import Iterable, Sequence
from itertools import count
from operator import attrgetter

from pipemax.coordinator.request import Request
from pipemax.coordinator.state import Decodes, Item, Part
from pipemax.proto.geometry import blocks_for
from pipemax.proto.messages.control import RowExtras, SampleRow, SampleRules, StepPlan
from pipemax.proto.messages.types import I32, pack_i32

_DRAW, _SEED, _NEEDS_ROW = attrgetter("draw"), attrgetter("seed"), attrgetter("needs_row")


def build_step_plan(
    parts: Iterable[Part],
    *,
    epoch: int,
    step: int,
    slot: int,
    wait_for_load: bool,
    block_size: int,
    eos_token_ids: frozenset[int],
    ended: Sequence[int] = (),
) -> StepPlan:
    """Columns of one step; see StepPlan for their shapes. Sample rules travel with a request's
    first row of an epoch, and what has `ended` with the next row that has rules: the last stage
    then reads both when it samples."""
    num_tokens, starts, counts = array("i"), array("i"), array("i")
    tables: list[array[int]] = []
    token_ids = array("i")
    sample: list[SampleRow] = []
    for part in parts:
        if isinstance(part, Decodes):
            sample += _decode_rows(len(starts), part.requests, token_ids, epoch, eos_token_ids)
            num_tokens.extend(array("i", [1]) * len(part.requests))
            starts.extend(part.starts)
            counts.extend(map(len, part.tables))
            tables += part.tables
            continue
        index, num_blocks = len(starts), blocks_for(part.end, block_size)
        sample += _score_rows(index, part) if part.scored else ()
        if part.samples:
            sample.append(_sample_row(index, part.request, epoch, eos_token_ids))
        num_tokens.append(part.num_tokens)
        starts.append(part.start)
        counts.append(num_blocks)
        table = part.request.table
        tables.append(table if len(table) == num_blocks else table[:num_blocks])
        token_ids.extend(part.request.tokens[part.start : part.end])
    return StepPlan(
        epoch=epoch,
        step=step,
        slot=slot,
        wait_for_load=wait_for_load,
        num_tokens=pack_i32(num_tokens),
        context_lens=pack_i32(starts),
        block_counts=pack_i32(counts),
        block_tables=_joined(tables),
        token_ids=pack_i32(token_ids),
        sample=tuple(sample),
        ended=tuple(ended) if ended and any(row.extras for row in sample) else (),
    )


def _joined(columns: Sequence["array[int]"]) -> I32:
    joined = b"".join(columns)
    if sys.byteorder == "little":
        return joined
    return pack_i32(array("i", joined))  # pragma: no cover


def _decode_rows(
    first: int,
    requests: Sequence[Request],
    token_ids: "array[int]",
    epoch: int,
    eos_token_ids: frozenset[int],
) -> list[SampleRow]:
    """One each, of items from `first` on; their tokens are added to `token_ids`."""
    token_ids.extend([request.tokens[-1] for request in requests])
    positions = [len(request.tokens) - request.num_prompt for request in requests]
    draws = zip(*map(_DRAW, requests), strict=True)
    rows = list(map(SampleRow, count(first), map(_SEED, requests), positions, *draws))
    if any(map(_NEEDS_ROW, requests)):
        for index, request in enumerate(requests):
            if request.needs_row:
                rows[index] = _sample_row(first + index, request, epoch, eos_token_ids)
    return rows


def _sample_row(
    index: int, request: Request, epoch: int, eos_token_ids: frozenset[int]
) -> SampleRow:
    sampling = request.sampling
    banned: tuple[int, ...] = ()
    if request.num_outputs < sampling.min_tokens:
        ends = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else eos_token_ids)
        banned = tuple(sorted(ends))
    return SampleRow(
        index,
        request.seed,
        request.num_outputs,
        *request.draw,
        banned,
        _extras(request, epoch, eos_token_ids),
    )


def _score_rows(index: int, item: Item) -> list[SampleRow]:
    """One for each prompt token whose logprobs the item gives, first to last."""
    num_logprobs = item.request.sampling.prompt_logprobs
    assert num_logprobs is not None
    last = item.last_target
    return [
        SampleRow(
            index,
            seed=0,
            position=0,
            temperature=0.0,
            top_k=0,
            top_p=1.0,
            min_p=0.0,
            extras=RowExtras(
                num_logprobs=num_logprobs,
                rows_back=item.end - target,
                target=item.request.tokens[target],
            ),
        )
        for target in range(last - item.scored + 1, last + 1)
    ]


def _extras(request: Request, epoch: int, eos_token_ids: frozenset[int]) -> RowExtras | None:
    """Remembers what was said."""
    wanted = request.sampling.logprobs
    num_logprobs = -1 if wanted is None else wanted
    if not request.has_rules:
        return None if wanted is None else RowExtras(num_logprobs=num_logprobs)
    rules = None if request.rules_epoch == epoch else _rules(request, eos_token_ids)
    request.rules_epoch = epoch
    return RowExtras(request.key, rules, num_logprobs)


def _rules(request: Request, eos_token_ids: frozenset[int]) -> SampleRules:
    sampling = request.sampling
    repeats = sampling.repetition_penalty != 1.0
    biases = sampling.logit_bias or {}
    return SampleRules(
        sampling.presence_penalty,
        sampling.frequency_penalty,
        sampling.repetition_penalty,
        pack_i32(sorted(set(request.tokens[: request.num_prompt]))) if repeats else b"",
        pack_i32(request.tokens[request.num_prompt :]),
        pack_i32(biases),
        tuple(biases.values()),
        pack_i32(sampling.allowed_token_ids or ()),
        tuple(map(pack_i32, request.bad_words)),
        request.grammar,
        pack_i32(sorted(eos_token_ids)) if request.grammar else b"",
    )
