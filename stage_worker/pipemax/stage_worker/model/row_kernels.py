"""Compiled passes over rows that a CPU would otherwise make as many small ones.

bfloat16 comes as its bits, int16, which NumPy and numba know: a bfloat16 is the upper half of a
float32. See `compiled` for why everything stands in this file.
"""

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from pipemax.stage_worker.compiled import compiled, one_compiler_at_a_time

I16Array: TypeAlias = npt.NDArray[np.int16]
I32Array: TypeAlias = npt.NDArray[np.int32]
F32Array: TypeAlias = npt.NDArray[np.float32]

# Sums may be reordered, which is what lets LLVM vectorise them.
_FAST_SUMS = {"reassoc", "contract", "nsz"}


def rms_norm(rows: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """x / sqrt(mean(x²) + epsilon) · weight for each row of `[rows, size]`; new, of the same dtype.

    Computed in float32; in bfloat16 the quotient is rounded before and after the weight, as
    transformers' modules do."""
    if rows.dtype not in (torch.bfloat16, torch.float32) or not rows.is_contiguous():
        return functional.rms_norm(rows, weight.shape, weight, epsilon)
    out = torch.empty_like(rows)
    if rows.dtype == torch.float32:
        _norm_float32(rows.numpy(), weight.numpy(), np.float32(epsilon), out.numpy())
    else:
        _norm_bfloat16(_bits(rows), _bits(weight), np.float32(epsilon), _bits(out))
    return out


def _bits(tensor: torch.Tensor) -> I16Array:
    return tensor.view(torch.int16).numpy()


def warm_up(dtype: torch.dtype) -> None:
    """Compiles for `dtype`, or loads what was compiled from disk."""
    with one_compiler_at_a_time(_norm_bfloat16):
        rows = torch.ones(1, 8, dtype=dtype)
        rms_norm(rows, rows[0], 1e-5)


@compiled(fastmath=_FAST_SUMS)
def _norm_float32(rows: F32Array, weight: F32Array, epsilon: Any, out: F32Array) -> None:
    size = rows.shape[1]
    for row in range(rows.shape[0]):
        squares = np.float32(0.0)
        for d in range(size):
            squares += rows[row, d] * rows[row, d]
        scale = np.float32(1.0) / np.sqrt(squares / np.float32(size) + epsilon)
        for d in range(size):
            out[row, d] = rows[row, d] * scale * weight[d]


@compiled(fastmath=_FAST_SUMS)
def _norm_bfloat16(rows: I16Array, weight: I16Array, epsilon: Any, out: I16Array) -> None:
    size = rows.shape[1]
    bits = np.empty(size, np.int32)
    values = bits.view(np.float32)
    weight_bits = np.empty(size, np.int32)
    for d in range(size):
        weight_bits[d] = np.int32(weight[d]) << np.int32(16)
    weights = weight_bits.view(np.float32)
    for row in range(rows.shape[0]):
        for d in range(size):
            bits[d] = np.int32(rows[row, d]) << np.int32(16)
        squares = np.float32(0.0)
        for d in range(size):
            squares += values[d] * values[d]
        scale = np.float32(1.0) / np.sqrt(squares / np.float32(size) + epsilon)
        for d in range(size):
            values[d] *= scale
        _round_to_bfloat16(bits)
        for d in range(size):
            values[d] *= weights[d]
        _round_to_bfloat16(bits)
        for d in range(size):
            out[row, d] = np.int16(bits[d] >> np.int32(16))


@compiled()
def _round_to_bfloat16(bits: I32Array) -> None:
    """float32, as bits, to the nearest bfloat16, of two the even one. No NaN comes here that a
    later rounding could turn into a number: its upper half is one already."""
    for d in range(bits.shape[0]):
        odd = (bits[d] >> np.int32(16)) & np.int32(1)
        bits[d] = (bits[d] + np.int32(0x7FFF) + odd) & np.int32(-65536)
