"""Log probabilities of tokens, of the logits as the model gives them (vLLM's `raw_logprobs`)."""

from collections.abc import Sequence
from typing import Final

import torch

from pipemax.proto.messages.control import NO_TOKEN, RowLogprobs, SampleRow
from pipemax.proto.messages.types import pack_f32, pack_i32

_ROWS_AT_ONCE: Final = 32
"""Bounds the copies of `[rows, vocab]`."""


def row_logprobs(
    logits: torch.Tensor,
    rows: Sequence[SampleRow],
    tokens: Sequence[int],
    indices: Sequence[int],
) -> tuple[RowLogprobs, ...]:
    """Of those `rows` that ask for them. `logits` float32 `[len(rows), vocab]`; `tokens`: what was
    picked, or had to be; `indices`: the rows' own in the plan."""
    asking = [
        i
        for i, (row, token) in enumerate(zip(rows, tokens, strict=True))
        if row.extras and row.extras.num_logprobs >= 0 and token != NO_TOKEN
    ]
    found: list[RowLogprobs] = []
    for start in range(0, len(asking), _ROWS_AT_ONCE):
        part = asking[start : start + _ROWS_AT_ONCE]
        table = torch.log_softmax(logits[part], dim=-1)
        own = table.gather(1, torch.tensor([tokens[i] for i in part])[:, None])
        ranks = ((table > own).sum(dim=-1) + 1).tolist()
        most = max(_count(rows[i], logits.shape[1]) for i in part)
        top, ids = table.topk(most, dim=-1)
        for place, i in enumerate(part):
            count = _count(rows[i], logits.shape[1])
            found.append(
                RowLogprobs(
                    indices[i],
                    ranks[place],
                    pack_i32([tokens[i], *ids[place, :count].tolist()]),
                    pack_f32([own[place].item(), *top[place, :count].tolist()]),
                )
            )
    return tuple(found)


def _count(row: SampleRow, vocab_size: int) -> int:
    assert row.extras is not None
    return min(row.extras.num_logprobs, vocab_size)
