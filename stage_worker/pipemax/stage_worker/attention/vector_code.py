"""Pieces of vector code in LLVM's own language: loads, stores, conversions and exp for sixteen
lanes of 32 bits; LLVM splits them where the CPU has shorter ones. Addresses are integers."""

import math
from collections.abc import Callable
from typing import Any, Final

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils

LANES: Final = 16
TILE_TOKENS: Final = 64
TILE_VECTORS: Final = TILE_TOKENS // LANES
ROW_BYTES: Final = 4 * TILE_TOKENS
"""Of packed keys and of scores."""
VECTOR_BYTES: Final = 4 * LANES

WORD, REAL, HALF = ir.IntType(32), ir.FloatType(), ir.IntType(16)
ADDRESS = ir.IntType(64)
WORDS = ir.VectorType(WORD, LANES)
REALS = ir.VectorType(REAL, LANES)
HALVES = ir.VectorType(HALF, LANES)
PAIRS = ir.VectorType(HALF, 2 * LANES)
LOWEST: Final = -3.0e38
"""A score below all others, and finite: differences with it are numbers."""

Builder = Any
Value = Any
LOG2_E: Final = math.log2(math.e)
_TAYLOR: Final = [math.log(2.0) ** power / math.factorial(power) for power in range(8)]
"""Of 2^x."""


class BFloat(ir.Type):  # type: ignore[misc]
    """llvmlite has no name for it."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BFloat)

    def __hash__(self) -> int:
        return hash(BFloat)


BFLOATS = ir.VectorType(BFloat(), 2 * LANES)
_HALF_BFLOATS = ir.VectorType(BFloat(), LANES)


def has_bfloat16_products() -> bool:
    """Whether this CPU, and this LLVM, multiply pairs of bfloat16. LLVM takes them as bfloats from
    version 17 on."""
    features = llvm.get_host_cpu_features()
    return bool(features.get("avx512bf16")) and llvm.llvm_version_info[0] >= 17


def splat(builder: Builder, scalar: Value, kind: Any) -> Value:
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, WORD(0))
    zeros = ir.Constant(ir.VectorType(WORD, kind.count), [0] * kind.count)
    return builder.shuffle_vector(first, ir.Constant(kind, ir.Undefined), zeros)


def reals_of(number: float) -> Value:
    return ir.Constant(REALS, [number] * LANES)


def words_of(number: int) -> Value:
    return ir.Constant(WORDS, [number] * LANES)


def shuffle(builder: Builder, a: Value, b: Value, lanes: list[int]) -> Value:
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(WORD, len(lanes)), lanes))


def call(builder: Builder, name: str, result: Any, *args: Value) -> Value:
    kind = ir.FunctionType(result, [arg.type for arg in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)


def multiply_add(builder: Builder, a: Value, b: Value, c: Value) -> Value:
    return call(builder, "llvm.fmuladd.v16f32", REALS, a, b, c)


def product(builder: Builder, dot: bool, word: Value, vector: Value, total: Value) -> Value:
    """Each word times each lane, added to `total`: float32, or with `dot` pairs of bfloat16."""
    if dot:
        name = "llvm.x86.avx512bf16.dpbf16ps.512"
        pairs = builder.bitcast(word, BFLOATS), builder.bitcast(vector, BFLOATS)
        return call(builder, name, REALS, total, *pairs)
    reals = builder.bitcast(word, REALS), builder.bitcast(vector, REALS)
    return multiply_add(builder, *reals, total)


def pointer(builder: Builder, address: Value, offset: int, kind: Any) -> Value:
    """A pointer to `kind`."""
    return builder.inttoptr(builder.add(address, ADDRESS(offset)), kind.as_pointer())


def load(builder: Builder, address: Value, offset: int, kind: Any) -> Value:
    return builder.load(pointer(builder, address, offset, kind), align=2)


def store(builder: Builder, value: Value, address: Value, offset: int) -> None:
    builder.store(value, pointer(builder, address, offset, value.type), align=2)


def below(builder: Builder, count: Value, lanes: int) -> Value:
    """A mask of the first `count` lanes."""
    kind = ir.VectorType(WORD, lanes)
    numbers = ir.Constant(kind, list(range(lanes)))
    return builder.icmp_signed("<", numbers, splat(builder, builder.trunc(count, WORD), kind))


NAMES = {REALS: "v16f32", WORDS: "v16i32", PAIRS: "v32i16"}


def load_part(builder: Builder, address: Value, count: Value, kind: Any) -> Value:
    """The first `count` elements and zeros. All of them in one go, where all are there."""
    result = cgutils.alloca_once(builder, kind)
    with builder.if_else(builder.icmp_signed(">=", count, ADDRESS(kind.count))) as (whole, part):
        with whole:
            builder.store(load(builder, address, 0, kind), result)
        with part:
            mask = below(builder, count, kind.count)
            zeros = ir.Constant(kind, [0] * kind.count)
            loaded = call(
                builder,
                f"llvm.masked.load.{NAMES[kind]}.p0",
                kind,
                pointer(builder, address, 0, kind),
                WORD(2),  # alignment
                mask,
                zeros,
            )
            builder.store(loaded, result)
    return builder.load(result)


def store_part(builder: Builder, value: Value, address: Value, count: Value) -> None:
    """The first `count` elements."""
    kind = value.type
    with builder.if_else(builder.icmp_signed(">=", count, ADDRESS(kind.count))) as (whole, part):
        with whole:
            store(builder, value, address, 0)
        with part:
            call(
                builder,
                f"llvm.masked.store.{NAMES[kind]}.p0",
                ir.VoidType(),
                value,
                pointer(builder, address, 0, kind),
                WORD(2),  # alignment
                below(builder, count, kind.count),
            )


def widen_bfloat16(builder: Builder, words: Value) -> Value:
    """A bfloat16 is the upper half of a float32."""
    return builder.bitcast(builder.shl(words, words_of(16)), REALS)


def widen_float16(builder: Builder, words: Value) -> Value:
    """Moves exponent and mantissa to float32's places and corrects the exponent's bias (15 to 127)
    by a multiplication, which also makes subnormals right. No infinities: KV has none."""
    sign = builder.shl(builder.and_(words, words_of(0x8000)), words_of(16))
    magnitude = builder.shl(builder.and_(words, words_of(0x7FFF)), words_of(13))
    scaled = builder.fmul(builder.bitcast(magnitude, REALS), reals_of(2.0**112))
    return builder.bitcast(builder.or_(builder.bitcast(scaled, WORDS), sign), REALS)


WIDEN = {types.int16: widen_bfloat16, types.uint16: widen_float16}
"""Of 16-bit elements in the lower halves of words; the upper ones are zero."""


def narrow_bfloat16(builder: Builder, reals: Value) -> Value:
    """The nearest bfloat16s, ties to even, in words whose upper halves are zero."""
    bits = builder.bitcast(reals, WORDS)
    odd = builder.and_(builder.lshr(bits, words_of(16)), words_of(1))
    rounded = builder.add(builder.add(bits, words_of(0x7FFF)), odd)
    return builder.lshr(rounded, words_of(16))


def narrow_float16(builder: Builder, reals: Value) -> Value:
    """The nearest float16s, ties to even, in words whose upper halves are zero. Below 2^-14 the sum
    with 0.5 rounds the mantissa where subnormals end."""
    bits = builder.bitcast(reals, WORDS)
    sign = builder.and_(builder.lshr(bits, words_of(16)), words_of(0x8000))
    magnitude = builder.and_(bits, words_of(0x7FFFFFFF))
    odd = builder.and_(builder.lshr(magnitude, words_of(13)), words_of(1))
    rounded = builder.add(builder.add(magnitude, words_of(0xFFF - (112 << 23))), odd)
    tiny = builder.fadd(builder.bitcast(magnitude, REALS), reals_of(0.5))
    finite = builder.select(
        builder.icmp_unsigned("<", magnitude, words_of(113 << 23)),
        builder.sub(builder.bitcast(tiny, WORDS), words_of(0x3F000000)),
        builder.lshr(rounded, words_of(13)),
    )
    is_nan = builder.icmp_unsigned(">", magnitude, words_of(0x7F800000))
    special = builder.select(is_nan, words_of(0x7E00), words_of(0x7C00))
    is_huge = builder.icmp_unsigned(">=", magnitude, words_of(0x477FF000))
    return builder.or_(builder.select(is_huge, special, finite), sign)


def narrow_by_cpu(builder: Builder, reals: Value) -> Value:
    """`narrow_bfloat16` to 16-bit lanes, by a CPU that multiplies bfloat16; subnormals become 0."""
    name = "llvm.x86.avx512bf16.cvtneps2bf16.512"
    return builder.bitcast(call(builder, name, _HALF_BFLOATS, reals), HALVES)


NARROW = {types.int16: narrow_bfloat16, types.uint16: narrow_float16}


def exp2(builder: Builder, x: Value, degree: int = 7) -> Value:
    """2^x of numbers below 128; below -125 that of -125.

    2^x = 2^n · 2^r with |r| ≤ 1/2, and 2^r by its Taylor polynomial: to 5e-9 of its value, and with
    degree 4 to 4e-5. The exponent n is added to its bits.
    """
    x = builder.select(builder.fcmp_ordered("<", x, reals_of(-125.0)), reals_of(-125.0), x)
    n = call(builder, "llvm.rint.v16f32", REALS, x)
    r = builder.fsub(x, n)
    p = reals_of(_TAYLOR[degree])
    for power in range(degree - 1, -1, -1):
        p = multiply_add(builder, p, r, reals_of(_TAYLOR[power]))
    exponent = builder.shl(builder.fptosi(n, WORDS), words_of(23))
    return builder.bitcast(builder.add(builder.bitcast(p, WORDS), exponent), REALS)


def exp(builder: Builder, x: Value) -> Value:
    """exp of numbers at most 88, to about 1e-7 of its value; below -87 that of -87.

    exp(x) = 2^n · exp(r) with |r| ≤ ln(2)/2; the Taylor polynomial of degree 7 is then exact to
    5e-9. ln(2) is subtracted in two parts, so that r keeps its last bits.
    """
    x = builder.select(builder.fcmp_ordered("<", x, reals_of(-87.0)), reals_of(-87.0), x)
    scaled = multiply_add(builder, x, reals_of(1.4426950408889634), reals_of(0.5))
    n = call(builder, "llvm.floor.v16f32", REALS, scaled)
    r = multiply_add(builder, n, reals_of(-0.693359375), x)
    r = multiply_add(builder, n, reals_of(2.12194440e-4), r)
    p = reals_of(1.0 / 5040.0)
    for divisor in (720.0, 120.0, 24.0, 6.0, 2.0, 1.0, 1.0):
        p = multiply_add(builder, p, r, reals_of(1.0 / divisor))
    exponent = builder.add(builder.fptosi(n, WORDS), words_of(127))
    power = builder.bitcast(builder.shl(exponent, words_of(23)), REALS)
    return builder.fmul(p, power)


def accumulate(
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
    index = builder.phi(ADDRESS)
    index.add_incoming(ADDRESS(0), before)
    sums = []
    for row in begin:
        sums.append([builder.phi(REALS) for _ in row])
        for total, first in zip(sums[-1], row, strict=True):
            total.add_incoming(first, before)
    vectors = right_side(index)
    at = builder.shl(index, ADDRESS(2))
    ends = []
    for left, row in zip(lefts, sums, strict=True):
        word = splat(builder, load(builder, builder.add(left, at), 0, WORD), WORDS)
        ends.append(
            [
                product(builder, dot, word, vector, total)
                for vector, total in zip(vectors, row, strict=True)
            ]
        )
    following = builder.add(index, ADDRESS(1))
    last = builder.block
    index.add_incoming(following, last)
    for row, ended in zip(sums, ends, strict=True):
        for total, end in zip(row, ended, strict=True):
            total.add_incoming(end, last)
    builder.cbranch(builder.icmp_signed("<", following, count), loop, after)
    builder.position_at_end(after)
    return ends


def prefetch(builder: Builder, address: Value, offset: int) -> None:
    """Asks the CPU to fetch a cache line, for reading. Any address is harmless."""
    line = pointer(builder, address, offset, ir.IntType(8))
    locality, data = WORD(2), WORD(1)
    call(builder, "llvm.prefetch.p0", ir.VoidType(), line, WORD(0), locality, data)
