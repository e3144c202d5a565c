"""What the KV pool holds, to numbers and back: float32 as it is, bfloat16 as int16 and float16 as
uint16, because NumPy and numba know neither; the element type tells which of the three it is."""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic


@intrinsic  # type: ignore[untyped-decorator]
def to_float32(typing_context: Any, value: Any) -> Any:
    """float32 of a pool element, chosen by its type."""
    codegen = {
        types.float32: _identity,
        types.int16: _widen_bfloat16,
        types.uint16: _widen_float16,
    }[value]
    return types.float32(value), codegen


def _identity(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    return args[0]


def _widen_bfloat16(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    """A bfloat16 is the upper half of a float32."""
    word = ir.IntType(32)
    bits = builder.shl(builder.zext(args[0], word), word(16))
    return builder.bitcast(bits, ir.FloatType())


def _widen_float16(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    """Moves exponent and mantissa to float32's places and corrects the exponent's bias (15 to 127)
    by a multiplication, which also makes subnormals right. No infinities: KV has none."""
    word, real = ir.IntType(32), ir.FloatType()
    bits = builder.zext(args[0], word)
    sign = builder.shl(builder.and_(bits, word(0x8000)), word(16))
    magnitude = builder.shl(builder.and_(bits, word(0x7FFF)), word(13))
    scaled = builder.fmul(builder.bitcast(magnitude, real), ir.Constant(real, 2.0**112))
    return builder.bitcast(builder.or_(builder.bitcast(scaled, word), sign), real)


@intrinsic  # type: ignore[untyped-decorator]
def of_float32(typing_context: Any, value: Any, element: Any) -> Any:
    """The pool element nearest to a float32, ties to even; `element` gives the type only."""
    codegen = {
        types.float32: _identity,
        types.int16: _narrow_bfloat16,
        types.uint16: _narrow_float16,
    }[element]
    return element(types.float32, element), codegen


def _narrow_bfloat16(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    word = ir.IntType(32)
    bits = builder.bitcast(args[0], word)
    odd = builder.and_(builder.lshr(bits, word(16)), word(1))
    rounded = builder.add(builder.add(bits, word(0x7FFF)), odd)
    is_nan = builder.icmp_unsigned(">", builder.and_(bits, word(0x7FFFFFFF)), word(0x7F800000))
    chosen = builder.select(is_nan, word(0x7FC00000), rounded)
    return builder.trunc(builder.lshr(chosen, word(16)), ir.IntType(16))


def _narrow_float16(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    """Below 2^-14 the sum with 0.5 rounds the mantissa where float16's subnormals end."""
    word, real = ir.IntType(32), ir.FloatType()
    bits = builder.bitcast(args[0], word)
    sign = builder.and_(builder.lshr(bits, word(16)), word(0x8000))
    magnitude = builder.and_(bits, word(0x7FFFFFFF))
    odd = builder.and_(builder.lshr(magnitude, word(13)), word(1))
    rounded = builder.add(builder.add(magnitude, word(0xFFF - (112 << 23))), odd)
    usual = builder.lshr(rounded, word(13))
    tiny = builder.fadd(builder.bitcast(magnitude, real), ir.Constant(real, 0.5))
    subnormal = builder.sub(builder.bitcast(tiny, word), word(0x3F000000))
    is_tiny = builder.icmp_unsigned("<", magnitude, word(113 << 23))
    finite = builder.select(is_tiny, subnormal, usual)
    is_huge = builder.icmp_unsigned(">=", magnitude, word(0x477FF000))
    is_nan = builder.icmp_unsigned(">", magnitude, word(0x7F800000))
    special = builder.select(is_nan, word(0x7E00), word(0x7C00))
    chosen = builder.select(is_huge, special, finite)
    return builder.trunc(builder.or_(chosen, sign), ir.IntType(16))
