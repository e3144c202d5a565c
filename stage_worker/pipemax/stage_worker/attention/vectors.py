"""Vector code of the CPU's attention kernels, written as LLVM's own: what its vectoriser does not
find. Sixteen lanes of 32 bits; LLVM splits them where the CPU has shorter ones.

Attention is two products of a few queries with 64 tokens at a time, a *tile*: queries times keys,
then weights times values. In both, one word of the left side is multiplied with rows of vectors of
the right side, which lie in scratch memory; so keys are packed transposed, a word of each token
next to the other tokens', and nothing is ever summed across lanes. A word is a float32, or, where
the CPU multiplies pairs of bfloat16 and adds both to a float32 (AVX512-BF16), such a pair; values
are then taken two tokens at a time.

Intrinsics take addresses. `element` and `dot` only give types: what the pool holds, and whether
words are pairs (an int) or not (None).
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from pipemax.stage_worker.attention import vector_ahead
from pipemax.stage_worker.attention import vector_code as ll
from pipemax.stage_worker.attention.vector_code import (
    LANES,
    Builder,
    Value,
)

# --- packing --------------------------------------------------------------------------------------


def _unpacked(lanes: int, width: int, high: bool) -> list[int]:
    """Lanes of two vectors in turns, `width` of each at a time, from the lower or the upper half of
    each 128 bits: x86's unpack instructions."""
    quarter, half = lanes // 4, lanes // 8
    found = []
    for part in range(4):
        base = part * quarter + (half if high else 0)
        for start in range(base, base + half, width):
            found += [*range(start, start + width), *range(lanes + start, lanes + start + width)]
    return found


def _columns(builder: Builder, rows: list[Value]) -> list[Value]:
    """The 16 columns of 16 rows of words, given as addresses. Four words at a time are loaded to
    where they belong, which leaves exchanges within 128 bits, half of what a CPU does at best."""
    columns = []
    four = ir.VectorType(ll.WORD, 4)
    for word in range(0, LANES, 4):
        parts = []
        for i in range(4):
            loaded = [ll.load(builder, rows[4 * q + i], 4 * word, four) for q in range(4)]
            halves = [ll.shuffle(builder, loaded[q], loaded[q + 1], list(range(8))) for q in (0, 2)]
            parts.append(ll.shuffle(builder, halves[0], halves[1], list(range(LANES))))
        pairs = [
            ll.shuffle(builder, parts[i], parts[i + 1], _unpacked(LANES, 1, high))
            for i in (0, 2)
            for high in (False, True)
        ]
        columns += [
            ll.shuffle(builder, pairs[i], pairs[i + 2], _unpacked(LANES, 2, high))
            for i in (0, 1)
            for high in (False, True)
        ]
    return columns


@intrinsic  # type: ignore[untyped-decorator]
def pack_keys(
    typing_context: Any,
    tokens: Any,
    offset: Any,
    words: Any,
    target: Any,
    element: Any,
    dot: Any,
) -> Any:
    """Transposes 16 words of 16 tokens: those at `offset` bytes of the rows whose addresses are at
    `tokens`; `words` of them are there. To rows at `target`, one per word of the left side."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        tokens, offset, words, target = args[:4]
        rows = [
            builder.add(ll.load(builder, tokens, 8 * token, ll.ADDRESS), offset)
            for token in range(LANES)
        ]
        columns = _columns(builder, _whole_rows(builder, rows, words))
        if element in ll.WIDEN and not isinstance(dot, types.Integer):
            widen = ll.WIDEN[element]
            columns = [
                widen(builder, half)
                for pair in columns
                for half in (
                    builder.and_(pair, ll.words_of(0xFFFF)),
                    builder.lshr(pair, ll.words_of(16)),
                )
            ]
        for row, column in enumerate(columns):
            ll.store(builder, column, target, row * ll.ROW_BYTES)
        return context.get_dummy_value()

    where = types.intp
    return types.void(where, where, where, where, element, dot), codegen


def _whole_rows(builder: Builder, rows: list[Value], words: Value) -> list[Value]:
    """Addresses of 16 words of each row: where they are, or, if not all are there, of a copy."""
    copies = cgutils.alloca_once(builder, ll.WORDS, LANES)
    copy = builder.ptrtoint(copies, ll.ADDRESS)
    is_part = builder.icmp_signed("<", words, ll.ADDRESS(LANES))
    with builder.if_then(is_part, likely=False):
        for index, row in enumerate(rows):
            ll.store(
                builder,
                ll.load_part(builder, row, words, ll.WORDS),
                copy,
                index * ll.VECTOR_BYTES,
            )
    return [
        builder.select(is_part, builder.add(copy, ll.ADDRESS(index * ll.VECTOR_BYTES)), row)
        for index, row in enumerate(rows)
    ]


def _every(builder: Builder, first: Value, distance: Value, count: int) -> list[Value]:
    """Addresses that far apart."""
    found = [first]
    for _ in range(1, count):
        found.append(builder.add(found[-1], distance))
    return found


def _store_rows(builder: Builder, rows: list[list[Value]], targets: list[Value]) -> None:
    for row, target in zip(rows, targets, strict=True):
        for v, vector in enumerate(row):
            ll.store(builder, vector, target, v * ll.VECTOR_BYTES)


def _make_score(queries: int) -> Callable[..., Any]:
    @intrinsic  # type: ignore[untyped-decorator]
    def score(typing_context: Any, left: Any, count: Any, keys: Any, scores: Any, dot: Any) -> Any:
        """Scores of a tile: queries of `count` words at `left`, times packed keys."""

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            left, count, keys, scores = args[:4]

            def right_side(index: Value) -> list[Value]:
                row = builder.add(keys, builder.mul(index, ll.ADDRESS(ll.ROW_BYTES)))
                return [
                    ll.load(builder, row, v * ll.VECTOR_BYTES, ll.WORDS)
                    for v in range(ll.TILE_VECTORS)
                ]

            lefts = _every(builder, left, builder.shl(count, ll.ADDRESS(2)), queries)
            begin = [[ll.reals_of(0.0)] * ll.TILE_VECTORS for _ in range(queries)]
            is_dot = isinstance(dot, types.Integer)
            ends = ll.accumulate(builder, is_dot, lefts, count, begin, right_side)
            _store_rows(builder, ends, _every(builder, scores, ll.ADDRESS(ll.ROW_BYTES), queries))
            return context.get_dummy_value()

        where = types.intp
        return types.void(where, where, where, where, dot), codegen

    return score  # type: ignore[no-any-return]


def _value_vectors(
    builder: Builder, element: Any, dot: bool, rows: list[Value], count: Value | None, vectors: int
) -> list[Value]:
    """`vectors` vectors of one token's values, or with `dot` of two tokens', from these addresses.
    `count`: of the elements that are there, None where all are. With `dot` the vectors hold the
    words of the lower and of the upper halves of each 8 elements."""
    if element not in ll.WIDEN:
        if count is None:
            return [
                ll.load(builder, rows[0], v * ll.VECTOR_BYTES, ll.WORDS) for v in range(vectors)
            ]
        return [ll.load_part(builder, rows[0], count, ll.WORDS)]
    found = []
    for v in range(0, vectors, 2):
        if count is None:
            taken = [ll.load(builder, row, v * ll.VECTOR_BYTES // 2, ll.PAIRS) for row in rows]
        else:
            taken = [ll.load_part(builder, row, count, ll.PAIRS) for row in rows]
        for half in range(2):
            if dot:
                found.append(
                    ll.shuffle(builder, taken[0], taken[1], _unpacked(2 * LANES, 1, bool(half)))
                )
                continue
            lanes = list(range(half * LANES, (half + 1) * LANES))
            words = builder.zext(ll.shuffle(builder, taken[0], taken[0], lanes), ll.WORDS)
            found.append(ll.WIDEN[element](builder, words))
    return found


def _make_add(queries: int, is_part: bool) -> Callable[..., Any]:
    @intrinsic  # type: ignore[untyped-decorator]
    def add(
        typing_context: Any,
        weights: Any,
        steps: Any,
        tokens: Any,
        offset: Any,
        count: Any,
        walk: Any,
        sums: Any,
        sums_bytes: Any,
        element: Any,
        dot: Any,
    ) -> Any:
        """Adds values times weights to 64 numbers of each query's `sums`, `sums_bytes` apart. A
        step is one token, with `dot` two; values are at `offset` bytes of the addresses at
        `tokens`. `is_part`: only one vector, or two of 16-bit elements, of which `count` are there.
        Each step takes one of `walk`, too."""

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            weights, steps, tokens, offset, count, walk, sums, apart = args[:8]
            is_dot = isinstance(dot, types.Integer)
            narrow = 1 if element not in ll.WIDEN else 2
            vectors = narrow if is_part else 4
            ahead = vector_ahead.Walk(builder, walk)

            def right_side(index: Value) -> list[Value]:
                ahead.step()
                rows = []
                shift = builder.shl(index, ll.ADDRESS(4 if is_dot else 3))
                for token in range(2 if is_dot else 1):
                    at = builder.add(tokens, shift)
                    row = ll.load(builder, at, 8 * token, ll.ADDRESS)
                    rows.append(builder.add(row, offset))
                there = count if is_part else None
                return _value_vectors(builder, element, is_dot, rows, there, vectors)

            targets = _every(builder, sums, apart, queries)
            begin = [
                [ll.load(builder, target, v * ll.VECTOR_BYTES, ll.REALS) for v in range(vectors)]
                for target in targets
            ]
            lefts = _every(builder, weights, ll.ADDRESS(ll.ROW_BYTES), queries)
            ends = ll.accumulate(builder, is_dot, lefts, steps, begin, right_side)
            _store_rows(builder, ends, targets)
            ahead.leave()
            return context.get_dummy_value()

        return types.void(*[types.intp] * 8, element, dot), codegen

    return add  # type: ignore[no-any-return]


score_1, score_2, score_3, score_4 = (_make_score(queries) for queries in (1, 2, 3, 4))
add_1, add_2, add_3, add_4 = (_make_add(queries, False) for queries in (1, 2, 3, 4))
add_part_1, add_part_2, add_part_3, add_part_4 = (_make_add(q, True) for q in (1, 2, 3, 4))
