"""One tile of CPU attention: the queries of each KV head over at most 64 tokens of a request.

Where the tokens' keys and values lie is a list of addresses, as blocks are scattered. Compiled code
that `kernels` calls; addresses are integers, and scratch memory is the caller's.
"""

from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from numba import njit

from pipemax.stage_worker.attention import (
    elements,
    vector_ahead,
    vector_code,
    vector_rows,
    vector_softmax,
    vectors,
)
from pipemax.stage_worker.attention.vector_ahead import take_step
from pipemax.stage_worker.attention.vector_code import LANES, TILE_TOKENS, VECTOR_BYTES
from pipemax.stage_worker.attention.vector_rows import score_rows
from pipemax.stage_worker.attention.vector_softmax import weigh
from pipemax.stage_worker.attention.vectors import (
    add_1,
    add_2,
    add_3,
    add_4,
    add_part_1,
    add_part_2,
    add_part_3,
    add_part_4,
    pack_keys,
    score_1,
    score_2,
    score_3,
    score_4,
)
from pipemax.stage_worker.compiled import compiled

Pool: TypeAlias = npt.NDArray[Any]
F32Array: TypeAlias = npt.NDArray[np.float32]
I32Array: TypeAlias = npt.NDArray[np.int32]
I64Array: TypeAlias = npt.NDArray[np.int64]

SOURCES = (elements, vector_ahead, vector_code, vector_rows, vector_softmax, vectors)
"""That compiled functions here are made of, besides this file."""
MOST_DIRECT: Final = 8
"""Queries of a KV head up to which keys are multiplied as they lie, rather than packed first."""
PASSES: Final = 2
"""Of a walk over the next tile: see `vector_ahead`."""
_WORD_BYTES, _PITCH = 4, 4 * TILE_TOKENS

_compiled = compiled(*SOURCES)


class Scratch(NamedTuple):
    """Addresses of what the queries of one KV head are computed with."""

    lefts: int
    """Their words: see `vectors`."""
    quads: int
    """The same, four words of each of four queries at a time."""
    keys: int
    """Room for a tile's packed keys."""
    scores: int
    """Room for scores of four queries."""
    tops: int
    totals: int
    sums: int
    """What the softmax has so far: see `weigh`."""
    width: int
    """Numbers from one query's sums to the next one's."""


class Tile(NamedTuple):
    """What is attended to."""

    tokens: int
    """The address of the addresses of the keys of all heads of `TILE_TOKENS` tokens."""
    num_tokens: int
    """Of those tokens that there are."""
    seen: int
    """How many tokens, counted from the tile's first, the first row may see; each further row may
    see one more."""
    window: int
    walk: int
    """The walk (see `vector_ahead`) over the next tile."""


@njit(inline="always")  # type: ignore[untyped-decorator]
def address(array: Any) -> Any:
    """Signed, as numba makes floats of sums of signed and unsigned numbers."""
    return np.intp(array.ctypes.data)


@_compiled
def find_tokens(
    pool: Pool, layer: int, blocks: I32Array, table: int, first: int, count: int, out: I64Array
) -> None:
    """Where the keys of `count` tokens from `first` on lie, to `out` `[TILE_TOKENS]`; after the
    last, the first again."""
    block_size = pool.shape[3]
    keys = address(pool) + layer * pool.strides[1]
    done = 0
    while done < count:
        offset = (first + done) % block_size
        run = min(block_size - offset, count - done)
        block = blocks[table + (first + done) // block_size]
        start = keys + block * pool.strides[0] + offset * pool.strides[3]
        for token in range(run):
            out[done + token] = start + token * pool.strides[3]
        done += run
    for token in range(count, out.shape[0]):
        out[token] = out[0]


@_compiled
def plan_walk(
    pool: Pool, tokens: I64Array, count: int, nothing: int, rows: I64Array, walk: I64Array
) -> None:
    """Makes `walk` one over the keys, then the values, of the first `count` of `tokens`. `rows`
    `[2 · PASSES · TILE_TOKENS + 1]` keeps the addresses. `nothing`: an address that may always be
    asked for."""
    row = 0
    for _ in range(PASSES):
        for part in range(2):
            for token in range(count):
                rows[row + token] = tokens[token] + part * pool.strides[2]
            row += count
    rows[row] = nothing
    walk[0], walk[1], walk[2] = address(rows), 0, pool.strides[3]
    walk[3] = address(rows) + 8 * row


@_compiled
def finish_walk(walk: I64Array) -> None:
    while walk[0] < walk[3]:
        take_step(address(walk))


@_compiled
def _pack(pool: Pool, tokens: int, count: int, kv_head: int, keys: int, dot: Any) -> None:
    """Packs a tile's keys of one head to the address `keys`."""
    element = pool[0, 0, 0, 0, 0, 0]
    head_dim, size = pool.shape[5], pool.itemsize
    row = kv_head * head_dim * size
    words = head_dim * size // _WORD_BYTES
    rows_of_word = 1 if size == 4 or dot is not None else 2
    for first in range(0, count, LANES):
        for word in range(0, words, LANES):
            pack_keys(
                tokens + 8 * first,
                row + _WORD_BYTES * word,
                words - word,
                keys + _WORD_BYTES * (word * rows_of_word * TILE_TOKENS + first),
                element,
                dot,
            )


@_compiled
def _score(queries: int, left: int, words: int, keys: int, scores: int, dot: Any) -> None:
    if queries == 4:
        score_4(left, words, keys, scores, dot)
    elif queries == 3:
        score_3(left, words, keys, scores, dot)
    elif queries == 2:
        score_2(left, words, keys, scores, dot)
    else:
        score_1(left, words, keys, scores, dot)


@_compiled
def _score_directly(
    pool: Pool, tile: Tile, quads: int, words: int, kv_head: int, scores: int, dot: Any
) -> None:
    element = pool[0, 0, 0, 0, 0, 0]
    row = kv_head * pool.strides[4]
    for first in range(0, tile.num_tokens, LANES):
        score_rows(
            quads,
            words // 4,
            tile.tokens + 8 * first,
            row,
            scores + _WORD_BYTES * first,
            tile.walk,
            element,
            dot,
        )


@_compiled
def _add(
    pool: Pool,
    queries: int,
    weights: int,
    steps: int,
    tile: Tile,
    kv_head: int,
    sums: int,
    width: int,
    dot: Any,
) -> None:
    """Values times weights, for `steps` tokens, or pairs of tokens, of one head."""
    element = pool[0, 0, 0, 0, 0, 0]
    head_dim, size, walk, tokens = pool.shape[5], pool.itemsize, tile.walk, tile.tokens
    offset = pool.strides[2] + kv_head * pool.strides[4]
    pitch, whole = _WORD_BYTES * width, head_dim // 64 * 64
    for d in range(0, whole, 64):
        at, to = offset + size * d, sums + _WORD_BYTES * d
        if queries == 4:
            add_4(weights, steps, tokens, at, 64, walk, to, pitch, element, dot)
        elif queries == 3:
            add_3(weights, steps, tokens, at, 64, walk, to, pitch, element, dot)
        elif queries == 2:
            add_2(weights, steps, tokens, at, 64, walk, to, pitch, element, dot)
        else:
            add_1(weights, steps, tokens, at, 64, walk, to, pitch, element, dot)
    for d in range(whole, head_dim, 64 // size):
        at, to, count = offset + size * d, sums + _WORD_BYTES * d, head_dim - d
        if queries == 4:
            add_part_4(weights, steps, tokens, at, count, walk, to, pitch, element, dot)
        elif queries == 3:
            add_part_3(weights, steps, tokens, at, count, walk, to, pitch, element, dot)
        elif queries == 2:
            add_part_2(weights, steps, tokens, at, count, walk, to, pitch, element, dot)
        else:
            add_part_1(weights, steps, tokens, at, count, walk, to, pitch, element, dot)


@njit(inline="always")  # type: ignore[untyped-decorator]
def _together(left: int, directly: bool) -> int:
    """Queries computed at a time, of those that are left: five and six are two threes."""
    if directly or left > 6:
        return min(left, 4)
    return left if left <= 4 else 3


@_compiled
def attend_tile(
    pool: Pool,
    kv_head: int,
    queries: int,
    group: int,
    words: int,
    directly: bool,
    tile: Tile,
    scratch: Scratch,
    scaling: Any,
    softcap: Any,
    dot: Any,
) -> None:
    """Queries of one KV head, `group` for each row, of `words` words, over one tile. `directly`:
    with keys as they lie."""
    width, window, count = scratch.width, tile.window, tile.num_tokens
    if not directly:
        _pack(pool, tile.tokens, count, kv_head, scratch.keys, dot)
    n = 0
    while n < queries:
        together = _together(queries - n, directly)
        most = min(count, tile.seen + (n + together - 1) // group)
        least = tile.seen + n // group - window if window > 0 else 0
        if most > 0 and least < count:
            sums, scores = scratch.sums + _WORD_BYTES * width * n, scratch.scores
            if directly:
                quads = scratch.quads + VECTOR_BYTES * (words // 4) * (n // 4)
                _score_directly(pool, tile, quads, words, kv_head, scores, dot)
            else:
                lefts = scratch.lefts + _WORD_BYTES * words * n
                _score(together, lefts, words, scratch.keys, scores, dot)
            for q in range(together):
                row_seen = tile.seen + (n + q) // group
                weigh(
                    scores + _PITCH * q,
                    max(0, row_seen - window) if window > 0 else 0,
                    min(count, row_seen),
                    scaling,
                    softcap,
                    scratch.tops + _WORD_BYTES * (n + q),
                    scratch.totals + VECTOR_BYTES * (n + q),
                    sums + _WORD_BYTES * width * q,
                    width // LANES,
                    tile.walk,
                    dot,
                )
            steps = most if dot is None else (most + 1) // 2
            _add(pool, together, scores, steps, tile, kv_head, sums, width, dot)
        n += together
