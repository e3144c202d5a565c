"""How Triton kernels are launched: sizes of tiles, warps, pipeline stages, splits. Imports neither
torch nor triton, so that what was measured can be looked up anywhere."""

from dataclasses import dataclass
from typing import Final

MAX_SPLITS: Final = 64
_PROGRAMS_PER_MULTIPROCESSOR: Final = 8
"""Decode programs that a step should have for each multiprocessor: those that run at once, about
three, and some more, so that the last ones leave little of the GPU idle."""


@dataclass(frozen=True, slots=True)
class Launch:
    """Of one kernel that reads K and V."""

    tile: int
    """Tokens of K and V at a time; a power of two, at least 16."""
    num_warps: int
    num_stages: int
    """Tiles under way from memory, the one computed with included."""


# What compiles without spilling registers and fits 99 KiB of shared memory, the least that GPUs
# since sm_80 have; a test compiles all of them.


def decode_launch(head_dim: int, itemsize: int) -> Launch:
    """For `attend_decodes`. `itemsize`: bytes of a number in the pool.

    8 KiB of K and as much of V at a time, three tiles under way: 38 KiB of shared memory, so that
    two programs fit a multiprocessor with 100 KiB, and five one with 228.
    """
    if itemsize == 4:
        return _float32(num_warps=8 if padded(head_dim) > 128 else 4)
    if padded(head_dim) > 128:
        return Launch(tile=32, num_warps=4, num_stages=2)
    return Launch(tile=64 if padded(head_dim) <= 64 else 32, num_warps=4, num_stages=3)


def prefill_launch(head_dim: int, itemsize: int) -> Launch:
    """For `attend_tiles`."""
    if itemsize == 4:
        return _float32(num_warps=4)
    if padded(head_dim) > 128:
        return Launch(tile=32, num_warps=8, num_stages=2)
    return Launch(tile=64, num_warps=4 if padded(head_dim) <= 64 else 8, num_stages=2)


def _float32(num_warps: int) -> Launch:
    """No tensor cores: products of float32 are made in registers, which leaves little room."""
    return Launch(tile=16, num_warps=num_warps, num_stages=1)


def num_splits(decodes: int, kv_heads: int, multiprocessors: int) -> int:
    """Parts that each decode's context is cut into. The same for every step of equally many
    decodes, because a CUDA graph's grid is fixed; a power of two."""
    wanted = _PROGRAMS_PER_MULTIPROCESSOR * multiprocessors
    splits = 1
    while splits < MAX_SPLITS and splits * decodes * kv_heads < wanted:
        splits *= 2
    return splits


def padded(size: int) -> int:
    """The next power of two, at least 16: what Triton and tensor cores take."""
    return max(16, 1 << (size - 1).bit_length())
