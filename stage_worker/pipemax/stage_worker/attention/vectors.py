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
from typing import Any, Final

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES: Final = 16
TILE_TOKENS: Final = 64
_ROW_BYTES: Final = 4 * TILE_TOKENS
"""Of packed keys and of scores."""
_VECTOR_BYTES: Final = 4 * LANES

_WORD, _REAL, _HALF = ir.IntType(32), ir.FloatType(), ir.IntType(16)
_ADDRESS = ir.IntType(64)
_WORDS = ir.VectorType(_WORD, LANES)
_REALS = ir.VectorType(_REAL, LANES)
_HALVES = ir.VectorType(_HALF, LANES)
_PAIRS = ir.VectorType(_HALF, 2 * LANES)
LOWEST: Final = -3.0e38
"""A score below all others, and finite: differences with it are numbers."""

Builder = Any
Value = Any


class _BFloat(ir.Type):  # type: ignore[misc]
    """llvmlite has no name for it."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


_BFLOATS = ir.VectorType(_BFloat(), 2 * LANES)


def has_bfloat16_products() -> bool:
    """Whether this CPU, and this LLVM, multiply pairs of bfloat16. LLVM takes them as bfloats from
    version 17 on."""
    features = llvm.get_host_cpu_features()
    return bool(features.get("avx512bf16")) and llvm.llvm_version_info[0] >= 17


# --- pieces ---------------------------------------------------------------------------------------


def _splat(builder: Builder, scalar: Value, kind: Any) -> Value:
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, _WORD(0))
    zeros = ir.Constant(ir.VectorType(_WORD, kind.count), [0] * kind.count)
    return builder.shuffle_vector(first, ir.Constant(kind, ir.Undefined), zeros)


def _real(number: float) -> Value:
    return ir.Constant(_REALS, [number] * LANES)


def _word(number: int) -> Value:
    return ir.Constant(_WORDS, [number] * LANES)


def _shuffle(builder: Builder, a: Value, b: Value, lanes: list[int]) -> Value:
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_WORD, len(lanes)), lanes))


def _call(builder: Builder, name: str, result: Any, *args: Value) -> Value:
    kind = ir.FunctionType(result, [arg.type for arg in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)


def _multiply_add(builder: Builder, a: Value, b: Value, c: Value) -> Value:
    return _call(builder, "llvm.fmuladd.v16f32", _REALS, a, b, c)


def _at(builder: Builder, address: Value, offset: int, kind: Any) -> Value:
    """A pointer to `kind`."""
    return builder.inttoptr(builder.add(address, _ADDRESS(offset)), kind.as_pointer())


def _load(builder: Builder, address: Value, offset: int, kind: Any) -> Value:
    return builder.load(_at(builder, address, offset, kind), align=2)


def _store(builder: Builder, value: Value, address: Value, offset: int) -> None:
    builder.store(value, _at(builder, address, offset, value.type), align=2)


def _below(builder: Builder, count: Value, lanes: int) -> Value:
    """A mask of the first `count` lanes."""
    kind = ir.VectorType(_WORD, lanes)
    numbers = ir.Constant(kind, list(range(lanes)))
    return builder.icmp_signed("<", numbers, _splat(builder, builder.trunc(count, _WORD), kind))


_NAMES = {_REALS: "v16f32", _WORDS: "v16i32", _PAIRS: "v32i16"}


def _load_part(builder: Builder, address: Value, count: Value, kind: Any) -> Value:
    """The first `count` elements and zeros. All of them in one go, where all are there."""
    result = cgutils.alloca_once(builder, kind)
    with builder.if_else(builder.icmp_signed(">=", count, _ADDRESS(kind.count))) as (whole, part):
        with whole:
            builder.store(_load(builder, address, 0, kind), result)
        with part:
            mask = _below(builder, count, kind.count)
            zeros = ir.Constant(kind, [0] * kind.count)
            loaded = _call(
                builder,
                f"llvm.masked.load.{_NAMES[kind]}.p0",
                kind,
                _at(builder, address, 0, kind),
                _WORD(2),  # alignment
                mask,
                zeros,
            )
            builder.store(loaded, result)
    return builder.load(result)


def _store_part(builder: Builder, value: Value, address: Value, count: Value) -> None:
    """The first `count` elements."""
    kind = value.type
    with builder.if_else(builder.icmp_signed(">=", count, _ADDRESS(kind.count))) as (whole, part):
        with whole:
            _store(builder, value, address, 0)
        with part:
            _call(
                builder,
                f"llvm.masked.store.{_NAMES[kind]}.p0",
                ir.VoidType(),
                value,
                _at(builder, address, 0, kind),
                _WORD(2),  # alignment
                _below(builder, count, kind.count),
            )


def _widen_bfloat16(builder: Builder, words: Value) -> Value:
    """A bfloat16 is the upper half of a float32."""
    return builder.bitcast(builder.shl(words, _word(16)), _REALS)


def _widen_float16(builder: Builder, words: Value) -> Value:
    """Moves exponent and mantissa to float32's places and corrects the exponent's bias (15 to 127)
    by a multiplication, which also makes subnormals right. No infinities: KV has none."""
    sign = builder.shl(builder.and_(words, _word(0x8000)), _word(16))
    magnitude = builder.shl(builder.and_(words, _word(0x7FFF)), _word(13))
    scaled = builder.fmul(builder.bitcast(magnitude, _REALS), _real(2.0**112))
    return builder.bitcast(builder.or_(builder.bitcast(scaled, _WORDS), sign), _REALS)


_WIDEN = {types.int16: _widen_bfloat16, types.uint16: _widen_float16}
"""Of 16-bit elements in the lower halves of words; the upper ones are zero."""


def _narrow_bfloat16(builder: Builder, reals: Value) -> Value:
    """The nearest bfloat16s, ties to even, in words whose upper halves are zero."""
    bits = builder.bitcast(reals, _WORDS)
    odd = builder.and_(builder.lshr(bits, _word(16)), _word(1))
    rounded = builder.add(builder.add(bits, _word(0x7FFF)), odd)
    return builder.lshr(rounded, _word(16))


def _narrow_float16(builder: Builder, reals: Value) -> Value:
    """The nearest float16s, ties to even, in words whose upper halves are zero. Below 2^-14 the sum
    with 0.5 rounds the mantissa where subnormals end."""
    bits = builder.bitcast(reals, _WORDS)
    sign = builder.and_(builder.lshr(bits, _word(16)), _word(0x8000))
    magnitude = builder.and_(bits, _word(0x7FFFFFFF))
    odd = builder.and_(builder.lshr(magnitude, _word(13)), _word(1))
    rounded = builder.add(builder.add(magnitude, _word(0xFFF - (112 << 23))), odd)
    tiny = builder.fadd(builder.bitcast(magnitude, _REALS), _real(0.5))
    finite = builder.select(
        builder.icmp_unsigned("<", magnitude, _word(113 << 23)),
        builder.sub(builder.bitcast(tiny, _WORDS), _word(0x3F000000)),
        builder.lshr(rounded, _word(13)),
    )
    is_nan = builder.icmp_unsigned(">", magnitude, _word(0x7F800000))
    special = builder.select(is_nan, _word(0x7E00), _word(0x7C00))
    is_huge = builder.icmp_unsigned(">=", magnitude, _word(0x477FF000))
    return builder.or_(builder.select(is_huge, special, finite), sign)


_NARROW = {types.int16: _narrow_bfloat16, types.uint16: _narrow_float16}


def _exp(builder: Builder, x: Value) -> Value:
    """exp of numbers at most 88, to about 1e-7 of its value; below -87 that of -87.

    exp(x) = 2^n · exp(r) with |r| ≤ ln(2)/2; the Taylor polynomial of degree 7 is then exact to
    5e-9. ln(2) is subtracted in two parts, so that r keeps its last bits.
    """
    x = builder.select(builder.fcmp_ordered("<", x, _real(-87.0)), _real(-87.0), x)
    scaled = _multiply_add(builder, x, _real(1.4426950408889634), _real(0.5))
    n = _call(builder, "llvm.floor.v16f32", _REALS, scaled)
    r = _multiply_add(builder, n, _real(-0.693359375), x)
    r = _multiply_add(builder, n, _real(2.12194440e-4), r)
    p = _real(1.0 / 5040.0)
    for divisor in (720.0, 120.0, 24.0, 6.0, 2.0, 1.0, 1.0):
        p = _multiply_add(builder, p, r, _real(1.0 / divisor))
    exponent = builder.add(builder.fptosi(n, _WORDS), _word(127))
    power = builder.bitcast(builder.shl(exponent, _word(23)), _REALS)
    return builder.fmul(p, power)


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
    four = ir.VectorType(_WORD, 4)
    for word in range(0, LANES, 4):
        parts = []
        for i in range(4):
            loaded = [_load(builder, rows[4 * q + i], 4 * word, four) for q in range(4)]
            halves = [_shuffle(builder, loaded[q], loaded[q + 1], list(range(8))) for q in (0, 2)]
            parts.append(_shuffle(builder, halves[0], halves[1], list(range(LANES))))
        pairs = [
            _shuffle(builder, parts[i], parts[i + 1], _unpacked(LANES, 1, high))
            for i in (0, 2)
            for high in (False, True)
        ]
        columns += [
            _shuffle(builder, pairs[i], pairs[i + 2], _unpacked(LANES, 2, high))
            for i in (0, 1)
            for high in (False, True)
        ]
    return columns


def _prefetch(builder: Builder, address: Value, lines: int) -> None:
    """Asks the CPU to fetch cache lines, for reading. Any address is harmless."""
    for line in range(lines):
        pointer = _at(builder, address, 64 * line, ir.IntType(8))
        _call(builder, "llvm.prefetch.p0", ir.VoidType(), pointer, _WORD(0), _WORD(2), _WORD(1))


@intrinsic  # type: ignore[untyped-decorator]
def pack_keys(
    typing_context: Any,
    tokens: Any,
    offset: Any,
    words: Any,
    target: Any,
    ahead: Any,
    ahead_offset: Any,
    element: Any,
    dot: Any,
) -> Any:
    """Transposes 16 words of 16 tokens: those at `offset` bytes of the rows whose addresses are at
    `tokens`; `words` of them are there. To rows at `target`, one per word of the left side.
    Prefetches a line at `ahead_offset` bytes of each of the 16 addresses at `ahead`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        tokens, offset, words, target, ahead, ahead_offset = args[:6]
        rows = []
        for token in range(LANES):
            coming = _load(builder, ahead, 8 * token, _ADDRESS)
            _prefetch(builder, builder.add(coming, ahead_offset), 1)
            rows.append(builder.add(_load(builder, tokens, 8 * token, _ADDRESS), offset))
        columns = _columns(builder, _whole_rows(builder, rows, words))
        if element in _WIDEN and not isinstance(dot, types.Integer):
            widen = _WIDEN[element]
            columns = [
                widen(builder, half)
                for pair in columns
                for half in (builder.and_(pair, _word(0xFFFF)), builder.lshr(pair, _word(16)))
            ]
        for row, column in enumerate(columns):
            _store(builder, column, target, row * _ROW_BYTES)
        return context.get_dummy_value()

    where = types.intp
    return types.void(where, where, where, where, where, where, element, dot), codegen


def _whole_rows(builder: Builder, rows: list[Value], words: Value) -> list[Value]:
    """Addresses of 16 words of each row: where they are, or, if not all are there, of a copy."""
    copies = cgutils.alloca_once(builder, _WORDS, LANES)
    copy = builder.ptrtoint(copies, _ADDRESS)
    is_part = builder.icmp_signed("<", words, _ADDRESS(LANES))
    with builder.if_then(is_part, likely=False):
        for index, row in enumerate(rows):
            _store(builder, _load_part(builder, row, words, _WORDS), copy, index * _VECTOR_BYTES)
    return [
        builder.select(is_part, builder.add(copy, _ADDRESS(index * _VECTOR_BYTES)), row)
        for index, row in enumerate(rows)
    ]


# --- products -------------------------------------------------------------------------------------


def _product(builder: Builder, dot: bool, word: Value, vector: Value, total: Value) -> Value:
    """`word` times each lane, added to `total`."""
    left = _splat(builder, word, _WORDS)
    if dot:
        name = "llvm.x86.avx512bf16.dpbf16ps.512"
        pairs = builder.bitcast(left, _BFLOATS), builder.bitcast(vector, _BFLOATS)
        return _call(builder, name, _REALS, total, *pairs)
    reals = builder.bitcast(left, _REALS), builder.bitcast(vector, _REALS)
    return _multiply_add(builder, *reals, total)


def _accumulate(
    builder: Builder,
    dot: bool,
    lefts: list[Value],
    count: Value,
    begin: list[list[Value]],
    right_side: Callable[[Value], list[Value]],
) -> list[list[Value]]:
    """The sums, by row of the left side and by vector, after `count` words of each of `lefts`, with
    the vectors that `right_side` makes for the index of a word. They stay in registers."""
    before = builder.block
    loop, after = builder.append_basic_block(), builder.append_basic_block()
    builder.branch(loop)
    builder.position_at_end(loop)
    index = builder.phi(_ADDRESS)
    index.add_incoming(_ADDRESS(0), before)
    sums = []
    for row in begin:
        sums.append([builder.phi(_REALS) for _ in row])
        for total, first in zip(sums[-1], row, strict=True):
            total.add_incoming(first, before)
    vectors = right_side(index)
    at = builder.shl(index, _ADDRESS(2))
    ends = []
    for left, row in zip(lefts, sums, strict=True):
        word = _load(builder, builder.add(left, at), 0, _WORD)
        ends.append(
            [
                _product(builder, dot, word, vector, total)
                for vector, total in zip(vectors, row, strict=True)
            ]
        )
    following = builder.add(index, _ADDRESS(1))
    last = builder.block
    index.add_incoming(following, last)
    for row, ended in zip(sums, ends, strict=True):
        for total, end in zip(row, ended, strict=True):
            total.add_incoming(end, last)
    builder.cbranch(builder.icmp_signed("<", following, count), loop, after)
    builder.position_at_end(after)
    return ends


def _every(builder: Builder, first: Value, distance: Value, count: int) -> list[Value]:
    """Addresses that far apart."""
    found = [first]
    for _ in range(1, count):
        found.append(builder.add(found[-1], distance))
    return found


def _store_rows(builder: Builder, rows: list[list[Value]], targets: list[Value]) -> None:
    for row, target in zip(rows, targets, strict=True):
        for v, vector in enumerate(row):
            _store(builder, vector, target, v * _VECTOR_BYTES)


def _make_score(queries: int) -> Callable[..., Any]:
    @intrinsic  # type: ignore[untyped-decorator]
    def score(typing_context: Any, left: Any, count: Any, keys: Any, scores: Any, dot: Any) -> Any:
        """Scores of a tile: queries of `count` words at `left`, times packed keys."""

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            left, count, keys, scores = args[:4]

            def right_side(index: Value) -> list[Value]:
                row = builder.add(keys, builder.mul(index, _ADDRESS(_ROW_BYTES)))
                return [
                    _load(builder, row, v * _VECTOR_BYTES, _WORDS) for v in range(_TILE_VECTORS)
                ]

            lefts = _every(builder, left, builder.shl(count, _ADDRESS(2)), queries)
            begin = [[_real(0.0)] * _TILE_VECTORS for _ in range(queries)]
            is_dot = isinstance(dot, types.Integer)
            ends = _accumulate(builder, is_dot, lefts, count, begin, right_side)
            _store_rows(builder, ends, _every(builder, scores, _ADDRESS(_ROW_BYTES), queries))
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
    if element not in _WIDEN:
        if count is None:
            return [_load(builder, rows[0], v * _VECTOR_BYTES, _WORDS) for v in range(vectors)]
        return [_load_part(builder, rows[0], count, _WORDS)]
    found = []
    for v in range(0, vectors, 2):
        if count is None:
            taken = [_load(builder, row, v * _VECTOR_BYTES // 2, _PAIRS) for row in rows]
        else:
            taken = [_load_part(builder, row, count, _PAIRS) for row in rows]
        for half in range(2):
            if dot:
                found.append(
                    _shuffle(builder, taken[0], taken[1], _unpacked(2 * LANES, 1, bool(half)))
                )
                continue
            lanes = list(range(half * LANES, (half + 1) * LANES))
            words = builder.zext(_shuffle(builder, taken[0], taken[0], lanes), _WORDS)
            found.append(_WIDEN[element](builder, words))
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
        ahead: Any,
        ahead_offset: Any,
        sums: Any,
        sums_bytes: Any,
        element: Any,
        dot: Any,
    ) -> Any:
        """Adds values times weights to 64 numbers of each query's `sums`, `sums_bytes` apart. A
        step is one token, with `dot` two; values are at `offset` bytes of the addresses at
        `tokens`. `is_part`: only one vector, or two of 16-bit elements, of which `count` are there.
        Prefetches as many bytes from `ahead_offset` bytes on of the addresses at `ahead`."""

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            weights, steps, tokens, offset, count, ahead, ahead_offset, sums, apart = args[:9]
            is_dot = isinstance(dot, types.Integer)
            narrow = 1 if element not in _WIDEN else 2
            vectors = narrow if is_part else 4
            lines = 1 if is_part else 4 // narrow

            def right_side(index: Value) -> list[Value]:
                rows = []
                shift = builder.shl(index, _ADDRESS(4 if is_dot else 3))
                for token in range(2 if is_dot else 1):
                    at = builder.add(tokens, shift)
                    row = _load(builder, at, 8 * token, _ADDRESS)
                    rows.append(builder.add(row, offset))
                    coming = _load(builder, builder.add(ahead, shift), 8 * token, _ADDRESS)
                    _prefetch(builder, builder.add(coming, ahead_offset), lines)
                there = count if is_part else None
                return _value_vectors(builder, element, is_dot, rows, there, vectors)

            targets = _every(builder, sums, apart, queries)
            begin = [
                [_load(builder, target, v * _VECTOR_BYTES, _REALS) for v in range(vectors)]
                for target in targets
            ]
            lefts = _every(builder, weights, _ADDRESS(_ROW_BYTES), queries)
            ends = _accumulate(builder, is_dot, lefts, steps, begin, right_side)
            _store_rows(builder, ends, targets)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 9, element, dot), codegen

    return add  # type: ignore[no-any-return]


_TILE_VECTORS = TILE_TOKENS // LANES
score_1, score_2, score_3, score_4 = (_make_score(queries) for queries in (1, 2, 3, 4))
add_1, add_2, add_3, add_4 = (_make_add(queries, False) for queries in (1, 2, 3, 4))
add_part_1, add_part_2, add_part_3, add_part_4 = (_make_add(q, True) for q in (1, 2, 3, 4))


# --- between the products, and at the end ---------------------------------------------------------


def _reduced(builder: Builder, name: str, vector: Value, *before: Value) -> Value:
    return _call(builder, f"llvm.vector.reduce.{name}.v16f32", _REAL, *before, vector)


def _softcapped(builder: Builder, scores: list[Value], softcap: Value) -> list[Value]:
    """softcap · tanh(score / softcap), and tanh(x) = 1 - 2 / (exp(2x) + 1), which beyond ±40 is ±1
    in float32."""
    cap = _splat(builder, softcap, _REALS)
    capped = []
    for score in scores:
        x = builder.fdiv(score, cap)
        for sign, limit in (("<", -40.0), (">", 40.0)):
            x = builder.select(builder.fcmp_ordered(sign, x, _real(limit)), _real(limit), x)
        e = _exp(builder, builder.fadd(x, x))
        part = builder.fdiv(_real(2.0), builder.fadd(e, _real(1.0)))
        capped.append(builder.fmul(cap, builder.fsub(_real(1.0), part)))
    return capped


@intrinsic  # type: ignore[untyped-decorator]
def weigh(
    typing_context: Any,
    scores: Any,
    first: Any,
    end: Any,
    scaling: Any,
    softcap: Any,
    top: Any,
    total: Any,
    sums: Any,
    vectors: Any,
    dot: Any,
) -> Any:
    """Makes one query's scores of a tile its weights, in place: those of tokens `first` to `end`
    of the tile; others weigh nothing.

    A weight is exp(score - top), `top` (a float32's address) the largest score so far. When that
    rises, what was summed before is scaled down: `total` (16 lanes of the weights' sum) and `sums`
    (`vectors` vectors of values times weights). Weights are float32, or, with `dot`, bfloat16.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        scores, first, end, scaling, softcap, top, total, sums, vectors = args[:9]
        scale = _splat(builder, scaling, _REALS)
        kept = [cgutils.alloca_once(builder, _REALS) for _ in range(_TILE_VECTORS)]
        found = []
        for v in range(_TILE_VECTORS):
            found.append(builder.fmul(_load(builder, scores, v * _VECTOR_BYTES, _REALS), scale))
            builder.store(found[-1], kept[v])
        with builder.if_then(
            builder.fcmp_ordered(">", softcap, ir.Constant(_REAL, 0.0)), likely=False
        ):
            for place, score in zip(kept, _softcapped(builder, found, softcap), strict=True):
                builder.store(score, place)
        seen, masked = _masked(builder, [builder.load(place) for place in kept], first, end)
        highest = masked[0]
        for score in masked[1:]:
            is_more = builder.fcmp_ordered(">", score, highest)
            highest = builder.select(is_more, score, highest)
        _raise_top(builder, highest, top, total, sums, vectors)
        highest = _splat(builder, _load(builder, top, 0, _REAL), _REALS)
        added = _load(builder, total, 0, _REALS)
        for v, score in enumerate(masked):
            weight = _exp(builder, builder.fsub(score, highest))
            weight = builder.select(seen[v], weight, _real(0.0))
            if isinstance(dot, types.Integer):
                words = _narrow_bfloat16(builder, weight)
                _store(builder, builder.trunc(words, _HALVES), scores, v * _VECTOR_BYTES // 2)
                weight = _widen_bfloat16(builder, words)
            else:
                _store(builder, weight, scores, v * _VECTOR_BYTES)
            added = builder.fadd(added, weight)
        _store(builder, added, total, 0)
        return context.get_dummy_value()

    where, real = types.intp, types.float32
    signature = types.void(where, where, where, real, real, where, where, where, where, dot)
    return signature, codegen


def _masked(
    builder: Builder, scores: list[Value], first: Value, end: Value
) -> tuple[list[Value], list[Value]]:
    """Which lanes count, and the scores with minus infinity in the others."""
    low, high = (_splat(builder, builder.trunc(at, _WORD), _WORDS) for at in (first, end))
    seen, masked = [], []
    for v, score in enumerate(scores):
        tokens = ir.Constant(_WORDS, list(range(v * LANES, (v + 1) * LANES)))
        inside = builder.and_(
            builder.icmp_signed(">=", tokens, low), builder.icmp_signed("<", tokens, high)
        )
        seen.append(inside)
        masked.append(builder.select(inside, score, _real(float("-inf"))))
    return seen, masked


def _raise_top(
    builder: Builder, highest: Value, top: Value, total: Value, sums: Value, vectors: Value
) -> None:
    """Makes the largest lane of `highest` the top, if it is larger. See `weigh`."""
    before = _load(builder, top, 0, _REAL)
    more = builder.fcmp_ordered(">", highest, _splat(builder, before, _REALS))
    any_more = builder.icmp_unsigned(
        "!=", builder.bitcast(more, ir.IntType(LANES)), ir.Constant(ir.IntType(LANES), 0)
    )
    with builder.if_then(any_more, likely=False):
        now = _reduced(builder, "fmax", highest)
        factor = _exp(builder, _splat(builder, builder.fsub(before, now), _REALS))
        _store(builder, now, top, 0)
        _store(builder, builder.fmul(_load(builder, total, 0, _REALS), factor), total, 0)
        with cgutils.for_range(builder, vectors) as loop:
            place = builder.add(sums, builder.mul(loop.index, _ADDRESS(_VECTOR_BYTES)))
            _store(builder, builder.fmul(_load(builder, place, 0, _REALS), factor), place, 0)


@intrinsic  # type: ignore[untyped-decorator]
def divide(
    typing_context: Any,
    sums: Any,
    total: Any,
    count: Any,
    target: Any,
    element: Any,
    dot: Any,
) -> Any:
    """Writes 32 numbers of `sums`, of which `count` are there, divided by the lanes of `total`
    together, as elements to `target`. With `dot` they lie as `_value_vectors` lays values out."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        sums, total, count, target = args[:4]
        nothing = ir.Constant(_REAL, -0.0)
        lanes = _load(builder, total, 0, _REALS)
        # Lanes may be summed in any order.
        kind = ir.FunctionType(_REAL, [_REAL, _REALS])
        reduce = cgutils.get_or_insert_function(
            builder.module, kind, "llvm.vector.reduce.fadd.v16f32"
        )
        whole = builder.call(reduce, [nothing, lanes], fastmath=("reassoc",))
        inverse = builder.fdiv(ir.Constant(_REAL, 1.0), whole)
        factor = _splat(builder, inverse, _REALS)
        pair = [
            builder.fmul(_load(builder, sums, v * _VECTOR_BYTES, _REALS), factor) for v in range(2)
        ]
        if element not in _NARROW:
            for v, numbers in enumerate(pair):
                left = builder.sub(count, _ADDRESS(v * LANES))
                place = builder.add(target, _ADDRESS(v * _VECTOR_BYTES))
                _store_part(builder, builder.bitcast(numbers, _WORDS), place, left)
            return context.get_dummy_value()
        order = list(range(2 * LANES))
        if isinstance(dot, types.Integer):
            order = [
                half * LANES + 4 * eight + lane
                for eight in range(4)
                for half in range(2)
                for lane in range(4)
            ]
        words = [_NARROW[element](builder, numbers) for numbers in pair]
        halves = [builder.trunc(word, _HALVES) for word in words]
        _store_part(builder, _shuffle(builder, halves[0], halves[1], order), target, count)
        return context.get_dummy_value()

    where = types.intp
    return types.void(where, where, where, where, element, dot), codegen
