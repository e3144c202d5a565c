"""Compiled CPU kernels that write keys and values to the paged KV pool, rotated where they are not.
See `kernels` for the pool."""

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from numba import njit

from pipemax.stage_worker.attention import elements
from pipemax.stage_worker.attention.elements import of_float32, to_float32
from pipemax.stage_worker.compiled import compiled

Pool: TypeAlias = npt.NDArray[Any]
F32Array: TypeAlias = npt.NDArray[np.float32]
I64Array: TypeAlias = npt.NDArray[np.int64]

_compiled = compiled(elements)


@_compiled
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
    return to_float32(of_float32(x, element))


@_compiled
def _normalise(rows: Pool, row: int, head: int, weight: F32Array, eps: Any) -> None:
    """Divides one head by the root of its mean square, then multiplies by `weight`."""
    head_dim = rows.shape[2]
    total = np.float32(0.0)
    for d in range(head_dim):
        x = to_float32(rows[row, head, d])
        total += x * x
    inverse = np.float32(1.0) / np.sqrt(total / np.float32(head_dim) + eps)
    for d in range(head_dim):
        x = rows[row, head, d]
        scaled = _rounded(to_float32(x) * inverse, x)
        rows[row, head, d] = of_float32(weight[d] * scaled, x)


@_compiled
def _rotate(rows: Pool, row: int, head: int, cos: F32Array, sin: F32Array) -> None:
    """Rotates the first `cos.shape[1]` numbers of one head, each half of them with the other."""
    half = cos.shape[1] // 2
    for d in range(half):
        low, high = rows[row, head, d], rows[row, head, d + half]
        x, y = to_float32(low), to_float32(high)
        rows[row, head, d] = of_float32(
            _rounded(x * _rounded(cos[row, d], low), low)
            - _rounded(y * _rounded(sin[row, d], low), low),
            low,
        )
        rows[row, head, d + half] = of_float32(
            _rounded(y * _rounded(cos[row, d + half], low), low)
            + _rounded(x * _rounded(sin[row, d + half], low), low),
            low,
        )


@_compiled
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
