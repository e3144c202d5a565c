"""Triton kernels that write and read the paged KV pool in place.

`key_pool` and `value_pool` point at K and V of one layer in block 0 of a pool `[num_blocks, layers,
2, block_size, kv_heads, head_dim]`; blocks are `block_stride` numbers apart. Pools have more than
2^31 numbers, so whatever is multiplied by that stride is 64-bit.

Softmax runs online in float32 and in powers of two (Milakov and Gimelshein, "Online normalizer
calculation for softmax", 2018; Dao, "FlashAttention-2", 2023): a score is multiplied by log2(e)
once, as part of its scale. A soft-capped score is `outer · tanh(inner · q·k)`, any other
`outer · q·k`.

Windows and numbers of splits are not specialized on: a step never waits for a compiler because it
has another number of requests.

The heads that share a KV head are rows of one matrix, so that K and V are read once for all of
them; in decode these rows are padded to 16, the least that tensor cores take.
"""

import triton
import triton.language as tl


@triton.jit
def write_kv(
    keys,
    values,
    key_pool,
    value_pool,
    slots,
    key_row_stride,
    key_head_stride,
    value_row_stride,
    value_head_stride,
    block_stride,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One row of K and V, `WIDTH` numbers of each. Grid (rows, parts of a row)."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    if slot >= 0:
        at = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
        inside = at < KV_HEADS * HEAD_DIM
        head, dim = at // HEAD_DIM, at % HEAD_DIM
        key = tl.load(
            keys + row * key_row_stride + head * key_head_stride + dim, mask=inside, other=0.0
        )
        value = tl.load(
            values + row * value_row_stride + head * value_head_stride + dim, mask=inside, other=0.0
        )
        target = slot // BLOCK_SIZE * block_stride + slot % BLOCK_SIZE * (KV_HEADS * HEAD_DIM)
        tl.store(key_pool + target + at, key, mask=inside)
        tl.store(value_pool + target + at, value, mask=inside)


@triton.jit
def _scores(query, keys, inner, outer, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr):
    """Scaled scores `[rows, keys]`, soft-capped if so."""
    products = tl.dot(query, tl.trans(keys), input_precision=PRECISION)
    if SOFTCAP:
        # tanh(x) = 1 - 2 / (exp(2x) + 1), right at both ends too.
        return outer * (1.0 - 2.0 / (tl.exp(2.0 * inner * products) + 1.0))
    return outer * products


@triton.jit
def _blocks_of(tables, tokens, end, BLOCK_SIZE: tl.constexpr):
    """Ids of the blocks of tokens of one item; 0 for tokens from `end` on, whatever is there."""
    return tl.load(tables + tokens // BLOCK_SIZE, mask=tokens < end, other=0)


@triton.jit
def _split(length, window, split, splits, TILE: tl.constexpr):
    """The first token that the last one sees, and the tokens [begin, end) of one split: as many
    tiles each as evenly makes `splits`, so that later splits may have none."""
    visible = tl.maximum(length - window, 0)
    first = visible // TILE * TILE
    share = tl.cdiv(tl.cdiv(length - first, splits), TILE) * TILE
    begin = first + split * share
    return visible, begin, tl.minimum(begin + share, length)


@triton.jit(do_not_specialize=["window", "splits"])
def attend_decodes(
    out,
    partial_sums,
    partial_stats,
    query,
    key_pool,
    value_pool,
    decode_items,
    query_starts,
    seq_lens,
    table_starts,
    block_tables,
    inner,
    outer,
    window,
    splits,
    query_row_stride,
    query_head_stride,
    block_stride,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    DIMS: tl.constexpr,
    TILE: tl.constexpr,
    WHOLE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One split of the context of one decode, for the heads of one KV head.

    Grid (kv_heads, splits, decodes): programs that run together read neighbouring heads of the
    same tokens. `WHOLE`, with one split, writes `out` `[rows, heads, head_dim]`; else the
    unnormalised `partial_sums` `[decodes, heads, splits, head_dim]` and `partial_stats` `[decodes,
    heads, splits, 2]`, the maximum and the sum of weights, float32, for `reduce_splits`.
    """
    kv_head, split, index = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    item = tl.load(decode_items + index)
    row = tl.load(query_starts + item).to(tl.int64)
    length = tl.load(seq_lens + item)
    tables = block_tables + tl.load(table_starts + item)
    visible, begin, end = _split(length, window, split, splits, TILE)

    heads, dims = tl.arange(0, ROWS), tl.arange(0, DIMS)
    real = (heads < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    head = kv_head * GROUP + heads
    own = tl.load(
        query + row * query_row_stride + head[:, None] * query_head_stride + dims[None, :],
        mask=real,
        other=0.0,
    )
    key_head = key_pool + kv_head * HEAD_DIM + dims[None, :]
    value_head = value_pool + kv_head * HEAD_DIM + dims[None, :]
    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, DIMS], tl.float32)
    blocks = _blocks_of(tables, begin + tl.arange(0, TILE), end, BLOCK_SIZE)
    for start in range(begin, end, TILE):
        tokens = start + tl.arange(0, TILE)
        inside = (tokens >= visible) & (tokens < end)
        at = blocks.to(tl.int64) * block_stride + tokens % BLOCK_SIZE * (KV_HEADS * HEAD_DIM)
        # One tile ahead: else each tile would wait for its block ids first.
        blocks = _blocks_of(tables, tokens + TILE, end, BLOCK_SIZE)
        there = inside[:, None] & (dims < HEAD_DIM)[None, :]
        keys = tl.load(key_head + at[:, None], mask=there, other=0.0)
        scores = _scores(own, keys, inner, outer, SOFTCAP, PRECISION)
        scores = tl.where(inside[None, :], scores, float("-inf"))
        # Every tile has a token that is seen, so the maximum is a number from the first on.
        larger = tl.maximum(maximum, tl.max(scores, 1))
        weights = tl.exp2(scores - larger[:, None])
        kept = tl.exp2(maximum - larger)
        values = tl.load(value_head + at[:, None], mask=there, other=0.0)
        total = total * kept + tl.sum(weights, 1)
        sums = tl.dot(
            weights.to(values.dtype), values, sums * kept[:, None], input_precision=PRECISION
        )
        maximum = larger

    if WHOLE:
        result = sums / tl.where(total > 0.0, total, 1.0)[:, None]
        place = (row * (KV_HEADS * GROUP) + head) * HEAD_DIM
        tl.store(out + place[:, None] + dims[None, :], result.to(out.dtype.element_ty), mask=real)
    elif begin < end:
        place = (index.to(tl.int64) * (KV_HEADS * GROUP) + head) * splits + split
        tl.store(partial_sums + place[:, None] * HEAD_DIM + dims[None, :], sums, mask=real)
        tl.store(partial_stats + place * 2, maximum, mask=heads < GROUP)
        tl.store(partial_stats + place * 2 + 1, total, mask=heads < GROUP)


@triton.jit(do_not_specialize=["window", "splits"])
def reduce_splits(
    out,
    partial_sums,
    partial_stats,
    decode_items,
    query_starts,
    seq_lens,
    window,
    splits,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    TILE: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
):
    """Puts the splits of one decode and head together. Grid (heads, decodes)."""
    head, index = tl.program_id(0), tl.program_id(1)
    item = tl.load(decode_items + index)
    row = tl.load(query_starts + item).to(tl.int64)
    numbers, dims = tl.arange(0, MAX_SPLITS), tl.arange(0, DIMS)
    _, begin, end = _split(tl.load(seq_lens + item), window, numbers, splits, TILE)
    there = (begin < end) & (numbers < splits)
    place = (index.to(tl.int64) * HEADS + head) * splits
    stats = partial_stats + (place + numbers) * 2
    maxima = tl.load(stats, mask=there, other=float("-inf"))
    totals = tl.load(stats + 1, mask=there, other=0.0)
    largest = tl.maximum(tl.max(maxima, 0), -1e30)  # a number even where there is no split
    total = tl.sum(totals * tl.exp2(maxima - largest), 0)
    used = tl.sum(there.to(tl.int32), 0)
    sums = tl.zeros([DIMS], tl.float32)
    for split in range(used):
        part = tl.load(
            partial_sums + (place + split) * HEAD_DIM + dims, mask=dims < HEAD_DIM, other=0.0
        )
        sums += part * tl.exp2(tl.load(partial_stats + (place + split) * 2) - largest)
    result = sums / tl.where(total > 0.0, total, 1.0)
    target = out + (row * HEADS + head) * HEAD_DIM + dims
    tl.store(target, result.to(out.dtype.element_ty), mask=dims < HEAD_DIM)


@triton.jit(do_not_specialize=["window"])
def attend_tiles(
    out,
    query,
    key_pool,
    value_pool,
    tile_items,
    tile_starts,
    query_starts,
    seq_lens,
    table_starts,
    block_tables,
    inner,
    outer,
    window,
    query_row_stride,
    query_head_stride,
    block_stride,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    DIMS: tl.constexpr,
    TILE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`TOKENS` new tokens of one item, for the heads of one KV head, over the item's whole context.

    Grid (kv_heads, tiles). Row m of the tile is token m // GROUP, head m % GROUP. Writes `out`
    `[rows, heads, head_dim]`.
    """
    kv_head, index = tl.program_id(0), tl.program_id(1)
    item = tl.load(tile_items + index)
    tile_start = tl.load(tile_starts + index)
    first_row = tl.load(query_starts + item)
    length = tl.load(seq_lens + item)
    new_tokens = tl.load(query_starts + item + 1) - first_row
    tables = block_tables + tl.load(table_starts + item)
    context = length - new_tokens

    rows, dims = tl.arange(0, ROWS), tl.arange(0, DIMS)
    token = tile_start + rows // GROUP
    head = kv_head * GROUP + rows % GROUP
    present = (rows < TOKENS * GROUP) & (token < new_tokens)
    real = present[:, None] & (dims < HEAD_DIM)[None, :]
    row = (first_row + token).to(tl.int64)
    own = tl.load(
        query + (row * query_row_stride + head * query_head_stride)[:, None] + dims[None, :],
        mask=real,
        other=0.0,
    )
    position = context + token
    end = tl.minimum(context + tile_start + TOKENS, length)
    begin = tl.maximum(context + tile_start + 1 - window, 0) // TILE * TILE
    key_head = key_pool + kv_head * HEAD_DIM + dims[None, :]
    value_head = value_pool + kv_head * HEAD_DIM + dims[None, :]
    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, DIMS], tl.float32)
    blocks = _blocks_of(tables, begin + tl.arange(0, TILE), end, BLOCK_SIZE)
    for start in range(begin, end, TILE):
        tokens = start + tl.arange(0, TILE)
        inside = tokens < end
        at = blocks.to(tl.int64) * block_stride + tokens % BLOCK_SIZE * (KV_HEADS * HEAD_DIM)
        # One tile ahead: else each tile would wait for its block ids first.
        blocks = _blocks_of(tables, tokens + TILE, end, BLOCK_SIZE)
        there = inside[:, None] & (dims < HEAD_DIM)[None, :]
        keys = tl.load(key_head + at[:, None], mask=there, other=0.0)
        scores = _scores(own, keys, inner, outer, SOFTCAP, PRECISION)
        seen = (tokens[None, :] <= position[:, None]) & (
            tokens[None, :] > position[:, None] - window
        )
        scores = tl.where(seen & inside[None, :], scores, float("-inf"))
        larger = tl.maximum(maximum, tl.max(scores, 1))
        # A window may hide all of a tile from a row; -inf - -inf would be NaN.
        base = tl.where(larger == float("-inf"), 0.0, larger)
        weights = tl.exp2(scores - base[:, None])
        kept = tl.exp2(maximum - base)
        values = tl.load(value_head + at[:, None], mask=there, other=0.0)
        total = total * kept + tl.sum(weights, 1)
        sums = tl.dot(
            weights.to(values.dtype), values, sums * kept[:, None], input_precision=PRECISION
        )
        maximum = larger

    result = sums / tl.where(total > 0.0, total, 1.0)[:, None]
    place = (row * (KV_HEADS * GROUP) + head) * HEAD_DIM
    tl.store(out + place[:, None] + dims[None, :], result.to(out.dtype.element_ty), mask=real)
