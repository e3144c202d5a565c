"""What stands for a token in the modelled device, and the tokens it makes up.

The *mark* of a token is a hash of it and of its position; the *context hash* of a sequence is the
sum of its tokens' marks, modulo 2^64. A sum can be taken over many tokens at once and continued
from any position, and since the position is part of each mark, order counts. The next token is a
hash of the context hash, so every output token depends on all tokens before it, and on nothing
else: neither stages nor batches nor the way KV took can change it, unless KV was wrong.

The hash is the output function of SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom
number generators", 2014).
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from pipemax.proto.messages.control import SampleRow

U64Array = npt.NDArray[np.uint64]

_POSITION_SHIFT: Final = np.uint64(32)
_GAMMA: Final = np.uint64(0x9E3779B97F4A7C15)
_FACTORS: Final = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_SHIFTS: Final = (np.uint64(30), np.uint64(27), np.uint64(31))
_TO_TOKEN: Final = np.uint64(0x746F6B656E)
"""Keeps hashes that make tokens apart from hashes that make marks."""


def scramble(values: U64Array) -> U64Array:
    """SplitMix64 of each value. Arrays only: NumPy warns when a single number overflows."""
    mixed = values + _GAMMA
    mixed = (mixed ^ (mixed >> _SHIFTS[0])) * _FACTORS[0]
    mixed = (mixed ^ (mixed >> _SHIFTS[1])) * _FACTORS[1]
    return mixed ^ (mixed >> _SHIFTS[2])


def words(token_ids: npt.NDArray[np.int32], positions: npt.NDArray[np.int64]) -> U64Array:
    """`[T]`: token and position in one number each, of which `scramble` makes the mark."""
    return (positions.astype(np.uint64) << _POSITION_SHIFT) | token_ids.astype(np.uint64)


def positions_in(found: U64Array) -> npt.NDArray[np.int64]:
    """The positions in such numbers."""
    return (found >> _POSITION_SHIFT).astype(np.int64)


def layers_mark(layers: tuple[int, int]) -> U64Array:
    """`[1]`: what a stage of these layers adds to its context hashes, so that one stage's KV is
    none of another's."""
    first, end = layers
    return scramble(np.array([(first << 32) | end], np.uint64))


def made_up_tokens(
    context_hashes: U64Array, rows: Sequence[SampleRow], vocab_size: int
) -> list[int]:
    """One token below `vocab_size` per row, from the hash of all the tokens before it.

    Every token is equally likely. With a temperature above zero the draw also depends on the row's
    seed and position. top_k, top_p and min_p have no likelihoods to compare and change nothing. A
    banned token is never picked, unless all are.
    """
    hashes = context_hashes ^ _TO_TOKEN
    drawn = [index for index, row in enumerate(rows) if row.temperature > 0]
    if drawn:
        seeds = np.array([rows[index].seed for index in drawn], np.uint64)
        positions = np.array([rows[index].position for index in drawn], np.uint64)
        hashes[drawn] ^= scramble(scramble(seeds) + positions)
    tokens: list[int] = (scramble(hashes) % np.uint64(vocab_size)).tolist()
    for index, row in enumerate(rows):
        if row.banned_token_ids:
            tokens[index] = _next_allowed(tokens[index], set(row.banned_token_ids), vocab_size)
    return tokens


def _next_allowed(token: int, banned: set[int], vocab_size: int) -> int:
    for step in range(min(len(banned), vocab_size - 1) + 1):
        candidate = (token + step) % vocab_size
        if candidate not in banned:
            return candidate
    return token


def continuation(prompt: Sequence[int], count: int, vocab_size: int) -> list[int]:
    """The greedy output after `prompt`: what every correct run gives. Reference for tests."""
    greedy = (SampleRow(0, 0, 0, 0.0, 0, 1.0, 0.0),)
    ids, positions = np.array(prompt, np.int32), np.arange(len(prompt))
    context_hash = scramble(words(ids, positions)).sum(keepdims=True, dtype=np.uint64)
    outputs: list[int] = []
    for position in range(len(prompt), len(prompt) + count):
        outputs += made_up_tokens(context_hash, greedy, vocab_size)
        newest = words(np.array(outputs[-1:], np.int32), np.array([position]))
        context_hash = context_hash + scramble(newest)
    return outputs
