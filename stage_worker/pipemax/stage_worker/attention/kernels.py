"""Compiled CPU kernels that read the paged KV pool in place; `rotation` has those that write it.

`pool` is `[num_blocks, layers, 2, block_size, kv_heads, head_dim]`, contiguous: float32 as it is,
bfloat16 passed as int16 and float16 as uint16. Sums are float32; bfloat16 is multiplied as it is
where the CPU can.
"""

from typing import Any

import numba
import numpy as np
from numba import prange

from pipemax.stage_worker.attention import tiles, vector_code
from pipemax.stage_worker.attention.elements import to_float32
from pipemax.stage_worker.attention.tiles import (
    MOST_DIRECT,
    PASSES,
    F32Array,
    I32Array,
    I64Array,
    Pool,
    Scratch,
    Tile,
    address,
    attend_tile,
    find_tokens,
    finish_walk,
    plan_walk,
)
from pipemax.stage_worker.attention.vector_ahead import WALK
from pipemax.stage_worker.attention.vector_code import LANES, LOWEST, TILE_TOKENS, VECTOR_BYTES
from pipemax.stage_worker.attention.vector_softmax import divide
from pipemax.stage_worker.batch import Runs
from pipemax.stage_worker.compiled import compiled

HAS_BFLOAT16_PRODUCTS = vector_code.has_bfloat16_products()
SOURCES = (*tiles.SOURCES, tiles)
"""That compiled functions here are made of, besides this file."""

_compiled = compiled(*SOURCES)


@_compiled
def _scratch(count: int) -> F32Array:
    """float32 [count], at the begin of a cache line."""
    room = np.empty(count + 16, np.float32)
    skip = (-address(room) % 64) // 4
    return room[skip : skip + count]


@_compiled
def _padded(head_dim: int, size: int) -> int:
    """Numbers of a row of scratch memory, for elements of `size` bytes: whole vectors."""
    step = 16 if size == 4 else 32
    return (head_dim + step - 1) // step * step


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
def _quads(lefts: F32Array, kv_heads: int, queries: int, words: int, out: F32Array) -> None:
    """To `out`, for each KV head and each four of its queries: four words of each of the four at a
    time, zeros of queries that are not there. `lefts`: all words of one query after the other."""
    fours = (queries + 3) // 4
    out[: kv_heads * fours * words * 4] = 0.0
    for kv_head in range(kv_heads):
        for query in range(queries):
            source = (kv_head * queries + query) * words
            target = (kv_head * fours + query // 4) * words * 4 + query % 4 * 4
            for word in range(0, words, 4):
                for part in range(4):
                    out[target + 4 * word + part] = lefts[source + word + part]


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
    items, group = row_counts.shape[0], heads // kv_heads
    most = 0
    for i in range(part, items, parts):
        most = max(most, row_counts[i])
    width = _padded(head_dim, size)
    words = head_dim if dot is None else head_dim // 2
    num_queries = kv_heads * most * group
    lefts = _scratch(num_queries * words)
    quads = _scratch(kv_heads * (MOST_DIRECT + 3) * words)
    tops, totals = _scratch(num_queries), _scratch(num_queries * LANES)
    sums, scores = _scratch(num_queries * width + 16), _scratch(4 * TILE_TOKENS)
    keys = _scratch((width + LANES) * TILE_TOKENS)
    tokens, next_tokens = np.empty(TILE_TOKENS, np.int64), np.empty(TILE_TOKENS, np.int64)
    walk, walked = np.zeros(WALK, np.int64), np.empty(2 * PASSES * TILE_TOKENS + 1, np.int64)
    next_count = 0
    for i in range(part, items, parts):
        rows, context = row_counts[i], context_lens[i]
        queries = rows * group
        directly = queries <= MOST_DIRECT and words % 4 == 0
        if dot is None:
            taken = lefts[: kv_heads * queries * head_dim].reshape((-1, head_dim))
            _take_queries(packed, first_rows[i], rows, kv_heads, group, taken, dot)
        else:
            halves = lefts.view(np.int16)[: kv_heads * queries * head_dim].reshape((-1, head_dim))
            _take_queries(packed, first_rows[i], rows, kv_heads, group, halves, dot)
        if directly:
            _quads(lefts, kv_heads, queries, words, quads)
        tops[:] = LOWEST
        totals[:] = 0.0
        sums[:] = 0.0
        end = context + rows
        first = max(0, context + 1 - window) if window > 0 else 0
        while first < end:
            count = min(TILE_TOKENS, end - first)
            if next_count == 0:
                find_tokens(pool, layer, blocks, tables[i], first, count, tokens)
            table, upcoming, remaining = tables[i], first + count, end - first - count
            if remaining == 0 and i + parts < items:
                table, n = tables[i + parts], context_lens[i + parts]
                upcoming = max(0, n + 1 - window) if window > 0 else 0
                remaining = n + row_counts[i + parts] - upcoming
            next_count = min(remaining, TILE_TOKENS)
            if next_count > 0:
                find_tokens(pool, layer, blocks, table, upcoming, next_count, next_tokens)
            plan_walk(pool, next_tokens, next_count, address(keys), walked, walk)
            tile = Tile(address(tokens), count, context + 1 - first, window, address(walk))
            for kv_head in range(kv_heads):
                before = kv_head * queries
                scratch = Scratch(
                    address(lefts) + 4 * words * before,
                    address(quads) + VECTOR_BYTES * (words // 4) * kv_head * ((queries + 3) // 4),
                    address(keys),
                    address(scores),
                    address(tops) + 4 * before,
                    address(totals) + VECTOR_BYTES * before,
                    address(sums) + 4 * width * before,
                    width,
                )
                attend_tile(
                    pool,
                    kv_head,
                    queries,
                    group,
                    words,
                    directly,
                    tile,
                    scratch,
                    scaling,
                    softcap,
                    dot,
                )
            finish_walk(walk)
            tokens, next_tokens = next_tokens, tokens
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
                target = address(out) + row * out.strides[0] + head * out.strides[1]
                for d in range(0, head_dim, 2 * LANES):
                    divide(
                        address(sums) + 4 * (at * width + d),
                        address(totals) + VECTOR_BYTES * at,
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
