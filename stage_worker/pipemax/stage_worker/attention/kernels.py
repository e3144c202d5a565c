"""Compiled CPU kernels that read the paged KV pool in place; `rotation` has those that write it.

`pool` is `[num_blocks, layers, 2, block_size, kv_heads, head_dim]`, contiguous: float32 as it is,
bfloat16 passed as int16 and float16 as uint16. Sums are float32; bfloat16 is multiplied as it is
where the CPU can.
"""

from typing import Any, TypeAlias

import numba
import numpy as np
import numpy.typing as npt
from numba import njit, prange

from pipemax.stage_worker.attention import elements, vector_code, vector_softmax, vectors
from pipemax.stage_worker.attention.elements import to_float32
from pipemax.stage_worker.attention.vector_code import LANES, LOWEST, TILE_TOKENS
from pipemax.stage_worker.attention.vector_softmax import divide, weigh
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
from pipemax.stage_worker.batch import Runs
from pipemax.stage_worker.compiled import compiled

Pool: TypeAlias = npt.NDArray[Any]
F32Array: TypeAlias = npt.NDArray[np.float32]
I32Array: TypeAlias = npt.NDArray[np.int32]
I64Array: TypeAlias = npt.NDArray[np.int64]

HAS_BFLOAT16_PRODUCTS = vector_code.has_bfloat16_products()
SOURCES = (elements, vector_code, vector_softmax, vectors)
"""That compiled functions here are made of, besides this file."""

_compiled = compiled(*SOURCES)


@njit(inline="always")  # type: ignore[untyped-decorator]
def _address(array: Any) -> Any:
    """Signed, as numba makes floats of sums of signed and unsigned numbers."""
    return np.intp(array.ctypes.data)


@_compiled
def _addresses(
    pool: Pool, layer: int, blocks: I32Array, table: int, first: int, count: int, out: I64Array
) -> None:
    """Where the keys of `count` tokens from `first` on lie, to `out` `[TILE_TOKENS]`; after the
    last, the first again."""
    block_size = pool.shape[3]
    keys = _address(pool) + layer * pool.strides[1]
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
def _scratch(count: int) -> F32Array:
    """float32 [count], at the begin of a cache line."""
    room = np.empty(count + 16, np.float32)
    skip = (-_address(room) % 64) // 4
    return room[skip : skip + count]


@_compiled
def _padded(head_dim: int, size: int) -> int:
    """Numbers of a row of scratch memory, for elements of `size` bytes: whole vectors."""
    step = 16 if size == 4 else 32
    return (head_dim + step - 1) // step * step


@_compiled
def _pack(
    pool: Pool, tokens: I64Array, count: int, kv_head: int, keys: int, ahead: I64Array, dot: Any
) -> None:
    """Packs a tile's keys of one head to the address `keys`, and prefetches those at `ahead`."""
    element = pool[0, 0, 0, 0, 0, 0]
    head_dim, size = pool.shape[5], pool.itemsize
    row = kv_head * head_dim * size
    words = head_dim * size // 4
    rows_of_word = 1 if size == 4 or dot is not None else 2
    for first in range(0, count, LANES):
        for word in range(0, words, LANES):
            pack_keys(
                _address(tokens) + 8 * first,
                row + 4 * word,
                words - word,
                keys + 4 * (word * rows_of_word * TILE_TOKENS + first),
                _address(ahead) + 8 * first,
                4 * word,
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
def _add(
    queries: int,
    weights: int,
    steps: int,
    tokens: int,
    offset: int,
    head_dim: int,
    ahead: int,
    ahead_offset: int,
    sums: int,
    width: int,
    element: Any,
    size: int,
    dot: Any,
) -> None:
    pitch, whole = 4 * width, head_dim // 64 * 64
    for d in range(0, whole, 64):
        at, coming, to = offset + size * d, ahead_offset + size * d, sums + 4 * d
        if queries == 4:
            add_4(weights, steps, tokens, at, 64, ahead, coming, to, pitch, element, dot)
        elif queries == 3:
            add_3(weights, steps, tokens, at, 64, ahead, coming, to, pitch, element, dot)
        elif queries == 2:
            add_2(weights, steps, tokens, at, 64, ahead, coming, to, pitch, element, dot)
        else:
            add_1(weights, steps, tokens, at, 64, ahead, coming, to, pitch, element, dot)
    for d in range(whole, head_dim, 64 // size):
        at, coming, to = offset + size * d, ahead_offset + size * d, sums + 4 * d
        count = head_dim - d
        if queries == 4:
            add_part_4(weights, steps, tokens, at, count, ahead, coming, to, pitch, element, dot)
        elif queries == 3:
            add_part_3(weights, steps, tokens, at, count, ahead, coming, to, pitch, element, dot)
        elif queries == 2:
            add_part_2(weights, steps, tokens, at, count, ahead, coming, to, pitch, element, dot)
        else:
            add_part_1(weights, steps, tokens, at, count, ahead, coming, to, pitch, element, dot)


@_compiled
def _take_queries(
    packed: Pool, first_row: int, rows: int, kv_heads: int, group: int, out: Any, dot: Any
) -> None:
    """To `out` `[kv_heads · rows · group, head_dim]`, KV head by KV head and row by row."""
    at = 0
    for kv_head in range(kv_heads):
        for row in range(first_row, first_row + rows):
            for head in range(kv_head * group, (kv_head + 1) * group):
                for d in range(packed.shape[2]):
                    if dot is None:
                        out[at, d] = to_float32(packed[row, head, d])
                    else:
                        out[at, d] = packed[row, head, d]
                at += 1


@_compiled
def _attend_tile(
    pool: Pool,
    queries: int,
    group: int,
    words: int,
    lefts: int,
    keys: int,
    tokens: int,
    value_offset: int,
    ahead: int,
    scores: int,
    tops: int,
    totals: int,
    sums: int,
    width: int,
    count: int,
    seen: int,
    window: int,
    scaling: Any,
    softcap: Any,
    dot: Any,
) -> None:
    """Queries of one KV head, `group` for each row, over one tile of `count` tokens.

    `seen`: how many tokens, counted from the tile's first, the first row may see; each further row
    may see one more. `words` of each query at `lefts`. The other addresses: see `attend_part`.
    """
    element = pool[0, 0, 0, 0, 0, 0]
    head_dim, size = pool.shape[5], pool.itemsize
    pitch = 4 * TILE_TOKENS
    n = 0
    while n < queries:
        left = queries - n
        together = left if left <= 4 else (3 if left <= 6 else 4)
        most = min(count, seen + (n + together - 1) // group)
        least = seen + n // group - window if window > 0 else 0
        if most > 0 and least < count:
            to = sums + 4 * width * n
            _score(together, lefts + 4 * words * n, words, keys, scores, dot)
            for q in range(together):
                row_seen = seen + (n + q) // group
                weigh(
                    scores + pitch * q,
                    max(0, row_seen - window) if window > 0 else 0,
                    min(count, row_seen),
                    scaling,
                    softcap,
                    tops + 4 * (n + q),
                    totals + 64 * (n + q),
                    to + 4 * width * q,
                    width // LANES,
                    dot,
                )
            steps = most if dot is None else (most + 1) // 2
            _add(
                together,
                scores,
                steps,
                tokens,
                value_offset,
                head_dim,
                ahead,
                pool.strides[2],
                to,
                width,
                element,
                size,
                dot,
            )
        n += together


@_compiled
def _ahead(
    pool: Pool,
    layer: int,
    blocks: I32Array,
    table: int,
    first: int,
    count: int,
    tokens: I64Array,
    out: I64Array,
) -> None:
    """Which addresses to prefetch while the KV heads of a tile are computed, to `out` `[kv_heads,
    TILE_TOKENS]`: all heads' keys of the next tile, in the order in which they lie in memory."""
    _addresses(pool, layer, blocks, table, first, count, tokens)
    kv_heads, row = pool.shape[4], pool.strides[4]
    flat = out.reshape(-1)
    for token in range(TILE_TOKENS):
        for head in range(kv_heads):
            flat[token * kv_heads + head] = tokens[token] + head * row


@_compiled
def attend_part(
    pool: Pool,
    layer: int,
    packed: Pool,
    heads: int,
    first_rows: I64Array,
    row_counts: I32Array,
    context_lens: I32Array,
    tables: I32Array,
    blocks: I32Array,
    scaling: Any,
    softcap: Any,
    window: int,
    out: Pool,
    dot: Any,
    part: int,
    parts: int,
) -> None:
    """Attention of items `part, part + parts, ...`.

    `packed` `[T, at least heads, head_dim]` holds the queries. Item i has `row_counts[i]` rows from
    `first_rows[i]` on; its first row sees `context_lens[i]` tokens and itself, each further one a
    token more: those in the blocks `blocks[tables[i]:]`; with `window` > 0 the last `window` of
    them. `softcap` 0 is none. To `out` `[T, heads, head_dim]`. The caller has checked that all
    block ids exist. `dot`: None to compute in float32, 1 to multiply pairs of bfloat16.
    """
    kv_heads, head_dim, size = pool.shape[4], pool.shape[5], pool.itemsize
    group = heads // kv_heads
    most = 0
    for i in range(part, row_counts.shape[0], parts):
        most = max(most, row_counts[i])
    width = _padded(head_dim, size)
    words = head_dim if dot is None else head_dim // 2
    num_queries = kv_heads * most * group
    lefts = _scratch(num_queries * words)
    tops, totals = _scratch(num_queries), _scratch(num_queries * LANES)
    sums, scores = _scratch(num_queries * width + 16), _scratch(4 * TILE_TOKENS)
    keys = _scratch((width + LANES) * TILE_TOKENS)
    tokens, next_tokens = np.empty(TILE_TOKENS, np.int64), np.empty(TILE_TOKENS, np.int64)
    ahead = np.zeros((kv_heads, TILE_TOKENS), np.int64)
    for i in range(part, row_counts.shape[0], parts):
        rows, context = row_counts[i], context_lens[i]
        queries = rows * group
        if dot is None:
            taken = lefts[: kv_heads * queries * head_dim].reshape((-1, head_dim))
            _take_queries(packed, first_rows[i], rows, kv_heads, group, taken, dot)
        else:
            halves = lefts.view(np.int16)[: kv_heads * queries * head_dim].reshape((-1, head_dim))
            _take_queries(packed, first_rows[i], rows, kv_heads, group, halves, dot)
        tops[:] = LOWEST
        totals[:] = 0.0
        sums[:] = 0.0
        end = context + rows
        first = max(0, context + 1 - window) if window > 0 else 0
        while first < end:
            count = min(TILE_TOKENS, end - first)
            _addresses(pool, layer, blocks, tables[i], first, count, tokens)
            table, upcoming, remaining = tables[i], first + count, end - first - count
            if remaining == 0 and i + parts < row_counts.shape[0]:
                table, n = tables[i + parts], context_lens[i + parts]
                upcoming = max(0, n + 1 - window) if window > 0 else 0
                remaining = n + row_counts[i + parts] - upcoming
            remaining = min(remaining, TILE_TOKENS)
            if remaining > 0:
                _ahead(pool, layer, blocks, table, upcoming, remaining, next_tokens, ahead)
            for kv_head in range(kv_heads):
                _pack(pool, tokens, count, kv_head, _address(keys), ahead[kv_head], dot)
                before = kv_head * queries
                _attend_tile(
                    pool,
                    queries,
                    group,
                    words,
                    _address(lefts) + 4 * words * before,
                    _address(keys),
                    _address(tokens),
                    kv_head * head_dim * size + pool.strides[2],
                    _address(ahead[kv_head]),
                    _address(scores),
                    _address(tops) + 4 * before,
                    _address(totals) + 64 * before,
                    _address(sums) + 4 * width * before,
                    width,
                    count,
                    context + 1 - first,
                    window,
                    scaling,
                    softcap,
                    dot,
                )
            first += count
        _finish(pool, first_rows[i], rows, group, sums, totals, width, out, dot)


@_compiled
def _finish(
    pool: Pool,
    first_row: int,
    rows: int,
    group: int,
    sums: F32Array,
    totals: F32Array,
    width: int,
    out: Pool,
    dot: Any,
) -> None:
    """Writes an item's results."""
    head_dim, size = pool.shape[5], pool.itemsize
    element = pool[0, 0, 0, 0, 0, 0]
    at = 0
    for kv_head in range(pool.shape[4]):
        for row in range(first_row, first_row + rows):
            for head in range(kv_head * group, (kv_head + 1) * group):
                target = _address(out) + row * out.strides[0] + head * out.strides[1]
                for d in range(0, head_dim, 2 * LANES):
                    divide(
                        _address(sums) + 4 * (at * width + d),
                        _address(totals) + 64 * at,
                        head_dim - d,
                        target + size * d,
                        element,
                        dot,
                    )
                at += 1


@compiled(*SOURCES, parallel=True)
def _attend_parallel(
    pool: Pool,
    layer: int,
    packed: Pool,
    heads: int,
    first_rows: I64Array,
    row_counts: I32Array,
    context_lens: I32Array,
    tables: I32Array,
    blocks: I32Array,
    scaling: Any,
    softcap: Any,
    window: int,
    out: Pool,
    dot: Any,
    parts: int,
) -> None:
    for part in prange(parts):
        attend_part(
            pool,
            layer,
            packed,
            heads,
            first_rows,
            row_counts,
            context_lens,
            tables,
            blocks,
            scaling,
            softcap,
            window,
            out,
            dot,
            part,
            parts,
        )


def attend(
    pool: Pool,
    layer: int,
    packed: Pool,
    heads: int,
    runs: Runs,
    *,
    scaling: float,
    softcap: float,
    window: int,
    out: Pool,
    threads: int,
    pairs: bool,
) -> None:
    """`attend_part` for all items. `pairs`: multiply pairs of bfloat16, where the CPU can. One
    thread does without the parallel runtime, whose start and barrier would cost every layer."""
    scale, cap = np.float32(scaling), np.float32(softcap)
    dot = 1 if pairs and pool.dtype == np.int16 and HAS_BFLOAT16_PRODUCTS else None
    arguments = (pool, layer, packed, heads, *runs, scale, cap, window, out, dot)
    if threads == 1:
        attend_part(*arguments, 0, 1)
        return
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    _attend_parallel(*arguments, threads)
