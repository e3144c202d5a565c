"""Compiled CPU kernels that read and write the paged KV pool in place.

`pool` is `[num_blocks, layers, 2, block_size, kv_heads, head_dim]`, contiguous: float32 as it is,
bfloat16 passed as int16 and float16 as uint16, because NumPy and numba know neither; the element
type tells `to_float32` which of the three it reads. Everything is computed in float32.

All of it stands in one file on purpose: numba's cache on disk notices a change of this file only.
The cache is the `__pycache__` next to it, or the user's own cache folder: never a shared one.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias, TypeVar, cast

import numba
import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic

Pool: TypeAlias = npt.NDArray[Any]
F32Array: TypeAlias = npt.NDArray[np.float32]
I32Array: TypeAlias = npt.NDArray[np.int32]
I64Array: TypeAlias = npt.NDArray[np.int64]

_Function = TypeVar("_Function", bound=Callable[..., Any])

# Sums may be reordered, which is what lets LLVM vectorise them. Infinities and NaNs keep their
# meaning.
_FAST_SUMS = {"reassoc", "contract", "nsz"}


def _compiled(**options: Any) -> Callable[[_Function], _Function]:
    """`njit`, cached on disk where a private folder can be written."""

    def compile_lazily(function: _Function) -> _Function:
        try:
            compiled = njit(nogil=True, cache=True, **options)(function)
        except RuntimeError:  # no such folder: compile at every start
            compiled = njit(nogil=True, **options)(function)
        return cast(_Function, compiled)

    return compile_lazily


@intrinsic  # type: ignore[untyped-decorator]
def _to_float32(typing_context: Any, value: Any) -> Any:
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
def _float_of_bits(typing_context: Any, value: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), codegen


@intrinsic  # type: ignore[untyped-decorator]
def _of_float32(typing_context: Any, value: Any, element: Any) -> Any:
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


@intrinsic  # type: ignore[untyped-decorator]
def _prefetch(typing_context: Any, address: Any) -> Any:
    """Asks the CPU to fetch the cache line at an address, for reading. Any address is harmless."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word, pointer = ir.IntType(32), ir.IntType(8).as_pointer()
        function = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(ir.VoidType(), [pointer, word, word, word]),
            "llvm.prefetch.p0",
        )
        target = builder.inttoptr(args[0], pointer)
        builder.call(function, [target, word(0), word(2), word(1)])
        return context.get_dummy_value()

    return types.void(types.intp), codegen


@njit(inline="always")  # type: ignore[untyped-decorator]
def _prefetch_bytes(address: Any, count: Any) -> None:
    for line in range(0, count, 64):
        _prefetch(address + line)


@njit(inline="always")  # type: ignore[untyped-decorator]
def _exp(x: Any) -> Any:
    """exp of a float32 at most 88, to about 1e-7 of its value.

    exp(x) = 2^n · exp(r) with |r| ≤ ln(2)/2; the Taylor polynomial of degree 7 is then exact to
    5e-9. Unlike a call of the C library, LLVM vectorises it.
    """
    x = max(x, np.float32(-87.0))
    n = math.floor(x * np.float32(1.4426950408889634) + np.float32(0.5))
    r = x - n * np.float32(0.693359375)
    r = r + n * np.float32(2.12194440e-4)
    p = np.float32(1.0 / 5040.0)
    p = p * r + np.float32(1.0 / 720.0)
    p = p * r + np.float32(1.0 / 120.0)
    p = p * r + np.float32(1.0 / 24.0)
    p = p * r + np.float32(1.0 / 6.0)
    p = p * r + np.float32(0.5)
    p = p * r + np.float32(1.0)
    p = p * r + np.float32(1.0)
    return p * _float_of_bits((np.int32(n) + np.int32(127)) << np.int32(23))


@_compiled()
def write_kv(pool: Pool, layer: int, keys: Pool, values: Pool, slots: I64Array) -> None:
    """Writes `keys` and `values` `[T, kv_heads, head_dim]` to `slots` `[T]` of one layer.

    A slot is block id · block_size + offset. The caller has checked that all of them exist.
    """
    block_size = pool.shape[3]
    for row in range(slots.shape[0]):
        block = slots[row] // block_size
        offset = slots[row] % block_size
        for head in range(keys.shape[1]):
            for d in range(keys.shape[2]):
                pool[block, layer, 0, offset, head, d] = keys[row, head, d]
                pool[block, layer, 1, offset, head, d] = values[row, head, d]


@njit(inline="always")  # type: ignore[untyped-decorator]
def _rounded(x: Any, element: Any) -> Any:
    """`x`, a float32, as precise as an element of `element`'s type is."""
    return _to_float32(_of_float32(x, element))


@_compiled()
def _normalise(rows: Pool, row: int, head: int, weight: F32Array, eps: Any) -> None:
    """Divides one head by the root of its mean square, then multiplies by `weight`."""
    head_dim = rows.shape[2]
    total = np.float32(0.0)
    for d in range(head_dim):
        x = _to_float32(rows[row, head, d])
        total += x * x
    inverse = np.float32(1.0) / np.sqrt(total / np.float32(head_dim) + eps)
    for d in range(head_dim):
        x = rows[row, head, d]
        scaled = _rounded(_to_float32(x) * inverse, x)
        rows[row, head, d] = _of_float32(weight[d] * scaled, x)


@_compiled()
def _rotate(rows: Pool, row: int, head: int, cos: F32Array, sin: F32Array) -> None:
    """Rotates the first `cos.shape[1]` numbers of one head, each half of them with the other."""
    half = cos.shape[1] // 2
    for d in range(half):
        low, high = rows[row, head, d], rows[row, head, d + half]
        x, y = _to_float32(low), _to_float32(high)
        rows[row, head, d] = _of_float32(
            _rounded(x * _rounded(cos[row, d], low), low)
            - _rounded(y * _rounded(sin[row, d], low), low),
            low,
        )
        rows[row, head, d + half] = _of_float32(
            _rounded(y * _rounded(cos[row, d + half], low), low)
            + _rounded(x * _rounded(sin[row, d + half], low), low),
            low,
        )


@_compiled()
def rotate_and_write(
    pool: Pool,
    layer: int,
    packed: Pool,
    cos: F32Array,
    sin: F32Array,
    query_weight: F32Array,
    key_weight: F32Array,
    eps: Any,
    slots: I64Array,
) -> None:
    """Rotates the queries and keys of `packed` in place and writes keys and values to `slots`.

    `packed` is `[T, heads + 2 · kv_heads, head_dim]`: queries, keys, values. With weights
    `[head_dim]`, rather than `[0]`, queries and keys are normalised first. Rounds to the element
    type wherever transformers' modules do, so that keys are theirs to the bit.
    """
    block_size, kv_heads, head_dim = pool.shape[3], pool.shape[4], pool.shape[5]
    heads = packed.shape[1] - 2 * kv_heads
    for row in range(slots.shape[0]):
        for head in range(heads + kv_heads):
            if query_weight.shape[0] > 0:
                weight = query_weight if head < heads else key_weight
                _normalise(packed, row, head, weight, eps)
            _rotate(packed, row, head, cos, sin)
        block = slots[row] // block_size
        offset = slots[row] % block_size
        for head in range(kv_heads):
            for d in range(head_dim):
                pool[block, layer, 0, offset, head, d] = packed[row, heads + head, d]
                pool[block, layer, 1, offset, head, d] = packed[row, heads + kv_heads + head, d]


@_compiled(fastmath=_FAST_SUMS)
def _softmax(scores: F32Array, softcap: Any) -> None:
    """Softmax of one row of `scores` in place, after an optional soft-cap.

    Every loop starts at zero: where an index could be negative, numba has to allow for Python's
    meaning of it, and LLVM then no longer vectorises.
    """
    if softcap > 0.0:
        for t in range(scores.shape[0]):
            # tanh(x) = 1 - 2 / (exp(2x) + 1); beyond ±40 it is ±1 in float32
            x = min(max(scores[t] / softcap, np.float32(-40.0)), np.float32(40.0))
            e = _exp(np.float32(2.0) * x)
            scores[t] = softcap * (np.float32(1.0) - np.float32(2.0) / (e + np.float32(1.0)))
    top = np.float32(-np.inf)
    for t in range(scores.shape[0]):
        top = max(top, scores[t])
    total = np.float32(0.0)
    for t in range(scores.shape[0]):
        weight = _exp(scores[t] - top)
        scores[t] = weight
        total += weight
    inverse = np.float32(1.0) / total
    for t in range(scores.shape[0]):
        scores[t] *= inverse


@_compiled(fastmath=_FAST_SUMS)
def _score_block(
    keys: Pool, query: F32Array, scores: F32Array, first: int, offset: int, count: int, ahead: int
) -> None:
    """Adds a block's scores: tokens `offset:offset + count` of `keys` `[block_size, kv_heads,
    head_dim]` to columns `first:` of `scores` `[heads, tokens]`."""
    kv_heads, head_dim = keys.shape[1], keys.shape[2]
    group = query.shape[0] // kv_heads
    whole = count - count % 4
    stride = keys.strides[0]
    for step in range(0, whole, 4):  # four tokens at a time read the query once
        o, t = offset + step, first + step
        _prefetch_bytes(ahead + step * stride, 4 * stride)
        for kv_head in range(kv_heads):
            for head in range(kv_head * group, (kv_head + 1) * group):
                dot0 = dot1 = dot2 = dot3 = np.float32(0.0)
                for d in range(head_dim):
                    q = query[head, d]
                    dot0 += q * _to_float32(keys[o, kv_head, d])
                    dot1 += q * _to_float32(keys[o + 1, kv_head, d])
                    dot2 += q * _to_float32(keys[o + 2, kv_head, d])
                    dot3 += q * _to_float32(keys[o + 3, kv_head, d])
                scores[head, t] = dot0
                scores[head, t + 1] = dot1
                scores[head, t + 2] = dot2
                scores[head, t + 3] = dot3
    for step in range(whole, count):
        o, t = offset + step, first + step
        for kv_head in range(kv_heads):
            for head in range(kv_head * group, (kv_head + 1) * group):
                dot = np.float32(0.0)
                for d in range(head_dim):
                    dot += query[head, d] * _to_float32(keys[o, kv_head, d])
                scores[head, t] = dot


@_compiled(fastmath=_FAST_SUMS)
def _add_block(
    values: Pool,
    weights: F32Array,
    total: F32Array,
    first: int,
    offset: int,
    count: int,
    ahead: int,
) -> None:
    """Adds a block's values, each times its weight, to `total` `[heads, head_dim]`. Arguments as
    in `_score_block`."""
    kv_heads, head_dim = values.shape[1], values.shape[2]
    group = total.shape[0] // kv_heads
    whole = count - count % 4
    stride = values.strides[0]
    for step in range(0, whole, 4):  # four tokens at a time write the sum once
        o, t = offset + step, first + step
        _prefetch_bytes(ahead + step * stride, 4 * stride)
        for kv_head in range(kv_heads):
            for head in range(kv_head * group, (kv_head + 1) * group):
                weight0, weight1 = weights[head, t], weights[head, t + 1]
                weight2, weight3 = weights[head, t + 2], weights[head, t + 3]
                for d in range(head_dim):
                    total[head, d] += (
                        weight0 * _to_float32(values[o, kv_head, d])
                        + weight1 * _to_float32(values[o + 1, kv_head, d])
                        + weight2 * _to_float32(values[o + 2, kv_head, d])
                        + weight3 * _to_float32(values[o + 3, kv_head, d])
                    )
    for step in range(whole, count):
        o, t = offset + step, first + step
        for kv_head in range(kv_heads):
            for head in range(kv_head * group, (kv_head + 1) * group):
                weight = weights[head, t]
                for d in range(head_dim):
                    total[head, d] += weight * _to_float32(values[o, kv_head, d])


@_compiled(fastmath=_FAST_SUMS)
def attend_part(
    pool: Pool,
    layer: int,
    query: F32Array,
    tables: I32Array,
    lens: I32Array,
    blocks: I32Array,
    scaling: Any,
    softcap: Any,
    window: int,
    out: F32Array,
    part: int,
    parts: int,
) -> None:
    """Attention of single-token items `part, part + parts, ...`.

    query, out: float32 `[R, heads, head_dim]`. Item i attends to its first `lens[i]` tokens, in the
    blocks `blocks[tables[i]:]`; with `window` > 0 to the last `window` of them. `softcap` 0 is
    none. The caller has checked that all block ids exist.
    """
    block_size = pool.shape[3]
    num_heads, head_dim = query.shape[1], query.shape[2]
    longest = 0
    for i in range(part, lens.shape[0], parts):
        longest = max(longest, lens[i])
    scores = np.empty((num_heads, longest), np.float32)
    scaled = np.empty((num_heads, head_dim), np.float32)
    total = np.empty((num_heads, head_dim), np.float32)
    for i in range(part, lens.shape[0], parts):
        table, length = tables[i], lens[i]
        start = max(0, length - window) if window > 0 else 0
        for head in range(num_heads):
            for d in range(head_dim):
                scaled[head, d] = query[i, head, d] * scaling
                total[head, d] = 0.0
        first = start
        while first < length:
            offset = first % block_size
            count = min(block_size - offset, length - first)
            keys = pool[blocks[table + first // block_size], layer, 0]
            upcoming = min(first + count, length - 1)
            ahead = pool[blocks[table + upcoming // block_size], layer, 0].ctypes.data
            _score_block(keys, scaled, scores, first, offset, count, ahead)
            first += count
        for head in range(num_heads):
            _softmax(scores[head, start:length], softcap)
        first = start
        while first < length:
            offset = first % block_size
            count = min(block_size - offset, length - first)
            values = pool[blocks[table + first // block_size], layer, 1]
            upcoming = min(first + count, length - 1)
            ahead = pool[blocks[table + upcoming // block_size], layer, 1].ctypes.data
            _add_block(values, scores, total, first, offset, count, ahead)
            first += count
        for head in range(num_heads):
            for d in range(head_dim):
                out[i, head, d] = total[head, d]


@_compiled(parallel=True)
def _attend_parallel(
    pool: Pool,
    layer: int,
    query: F32Array,
    tables: I32Array,
    lens: I32Array,
    blocks: I32Array,
    scaling: Any,
    softcap: Any,
    window: int,
    out: F32Array,
    parts: int,
) -> None:
    for part in prange(parts):
        attend_part(
            pool, layer, query, tables, lens, blocks, scaling, softcap, window, out, part, parts
        )


def attend(
    pool: Pool,
    layer: int,
    query: F32Array,
    tables: I32Array,
    lens: I32Array,
    blocks: I32Array,
    *,
    scaling: float,
    softcap: float,
    window: int,
    out: F32Array,
    threads: int,
) -> None:
    """`attend_part` for all items. One thread does without the parallel runtime, whose start and
    barrier would cost every layer."""
    scale, cap = np.float32(scaling), np.float32(softcap)
    arguments = (pool, layer, query, tables, lens, blocks, scale, cap, window, out)
    if threads == 1:
        attend_part(*arguments, 0, 1)
        return
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    _attend_parallel(*arguments, threads)


def cache_folder() -> Path | None:
    """Where compiled kernels are kept on disk; None when no private folder can be written."""
    stats = getattr(attend_part, "stats", None)
    path = getattr(stats, "cache_path", None)
    return Path(path) if path else None
