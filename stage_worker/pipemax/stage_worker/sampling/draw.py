"""Picks tokens from logits.

Order and meaning of the parameters are vLLM's (its v1 sampler): banned tokens, temperature, min_p,
top_k, top_p (what else changes logits is in `rules`). What is left is drawn from by one uniform
number per (seed, position) and the inverse of the cumulative distribution, so that a draw depends
on nothing else: not on the batch, the stages or the time.

The number comes from Philox, a counter-based generator (Salmon et al., "Parallel random numbers: as
easy as 1, 2, 3", 2011), with the seed as key and the position as counter.
"""

from collections.abc import Sequence
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from pipemax.proto.messages.control import SampleRow

F64Array: TypeAlias = npt.NDArray[np.float64]
I64Array: TypeAlias = npt.NDArray[np.int64]

_ROWS_AT_ONCE: Final = 32
"""Bounds the float64 copies of `[rows, vocab]`: 40 MB for a vocabulary of 150,000."""
_BAN: Final = float("-inf")
_FLOORS: Final = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
"""Weights above which the tokens that top_p leaves are looked for; the largest weight is one."""


def sample(logits: torch.Tensor, rows: Sequence[SampleRow]) -> list[int]:
    """One token id per row of `logits`, float32 `[len(rows), vocab]`, which is left as it was.

    A banned token is never picked. Equal logits rank by token id, smaller first. A row whose
    largest logit is not a finite number (float16 overflowed, say) is not drawn from but answered
    greedily.
    """
    if logits.shape[0] != len(rows):
        raise ValueError(f"{logits.shape[0]} rows of logits for {len(rows)} sample rows")
    if not rows:
        return []
    logits = _without_banned(logits, rows)
    # NumPy finds the largest of a row in a sixth of the time that torch takes, the first one too.
    table = logits.numpy()
    likeliest = table.argmax(axis=1)
    tokens: list[int] = likeliest.tolist()
    finite = np.isfinite(np.take_along_axis(table, likeliest[:, None], 1)[:, 0]).tolist()
    drawn = [index for index, row in enumerate(rows) if row.temperature > 0.0 and finite[index]]
    for start in range(0, len(drawn), _ROWS_AT_ONCE):
        part = drawn[start : start + _ROWS_AT_ONCE]
        picked = _draw(logits[part].numpy(), [rows[index] for index in part])
        for index, token in zip(part, picked, strict=True):
            tokens[index] = token
    return tokens


def is_plain_greedy(row: SampleRow) -> bool:
    """The row's token is the likeliest of those not banned, and nothing else is asked for."""
    return row.temperature == 0.0 and row.extras is None


def uniform(seed: int, position: int) -> float:
    """The number in [0, 1) that decides the draw of a request's `position`-th output token."""
    return float(np.random.Generator(np.random.Philox(key=seed, counter=position)).random())


def _without_banned(logits: torch.Tensor, rows: Sequence[SampleRow]) -> torch.Tensor:
    pairs = [(index, token) for index, row in enumerate(rows) for token in row.banned_token_ids]
    if not pairs:
        return logits
    at = torch.tensor(pairs)
    logits = logits.clone()
    logits[at[:, 0], at[:, 1]] = _BAN
    return logits


def _draw(logits: npt.NDArray[np.float32], rows: Sequence[SampleRow]) -> list[int]:
    """Token ids for rows with a temperature above zero."""
    weights = _weights(logits, np.array([row.temperature for row in rows]))
    min_p = np.array([row.min_p for row in rows])
    weights[weights < min_p[:, None]] = 0.0  # the largest weight is exactly one
    uniforms = np.array([uniform(row.seed, row.position) for row in rows])
    tokens = np.empty(len(rows), np.int64)
    cut = np.array([row.top_p < 1.0 or 0 < row.top_k < logits.shape[1] for row in rows])
    if not cut.all():
        tokens[~cut] = _invert(weights[~cut], uniforms[~cut])
    for index in np.flatnonzero(cut).tolist():
        kept = _kept_tokens(weights[index], rows[index].top_k, rows[index].top_p)
        chosen = _invert(weights[index][kept][None], uniforms[index : index + 1])
        tokens[index] = kept[chosen[0]]
    return [int(token) for token in tokens]


def _weights(logits: npt.NDArray[np.float32], temperatures: F64Array) -> F64Array:
    """Probabilities `[rows, vocab]` in float64, each row scaled so that its largest is one."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    shifted /= temperatures[:, None]
    return np.exp(shifted, out=shifted)


def _kept_tokens(weights: F64Array, top_k: int, top_p: float) -> I64Array:
    """Token ids that top_k and top_p leave, likeliest first; at least one."""
    candidates = np.flatnonzero(weights)
    if top_k == 0:
        candidates = _likeliest(weights, candidates, top_p)
    if 0 < top_k < candidates.size:
        threshold = np.partition(weights[candidates], candidates.size - top_k)[-top_k]
        candidates = candidates[weights[candidates] >= threshold]
    order: I64Array = candidates[np.argsort(-weights[candidates], kind="stable")]
    if top_k > 0:
        order = order[:top_k]
    if top_p >= 1.0:
        return order
    before = np.cumsum(weights[order]) - weights[order]
    total = weights.sum() if top_k == 0 else weights[order].sum()
    kept: I64Array = order[before < top_p * total]
    return kept


def _likeliest(weights: F64Array, candidates: I64Array, top_p: float) -> I64Array:
    """Of `candidates`, all with any weight, so many of the likeliest that they have `top_p` of all
    weight: only these have to be sorted, of a large vocabulary a small part."""
    wanted = top_p * weights.sum()
    for floor in _FLOORS:
        found: I64Array = np.flatnonzero(weights >= floor)
        if weights[found].sum() > wanted:
            return found
    return candidates


def _invert(weights: F64Array, uniforms: F64Array) -> I64Array:
    """Per row, the index whose share of the cumulated `weights` the uniform number falls into."""
    cumulated = np.cumsum(weights, axis=1)
    targets = uniforms * cumulated[:, -1]
    chosen = (cumulated <= targets[:, None]).sum(axis=1)
    # Rounding can put a target at the very end: take the last index that has any weight.
    last = weights.shape[1] - 1 - np.argmax(weights[:, ::-1] > 0.0, axis=1)
    picked: I64Array = np.minimum(chosen, last)
    return picked
