"""Our Triton kernels, compiled for each kind of GPU: they fit, and spill nothing."""

import re
from typing import Any

import pytest

pytest.importorskip("triton")

from pipemax.proto.geometry import Dtype
from support import triton_compile
from support.triton_compile import SHARED_LIMIT_BYTES

_DTYPES: tuple[Dtype, ...] = ("bfloat16", "float16", "float32")
_HEAD_DIMS = (64, 80, 96, 128, 256)
_SUITE = {
    *(("bfloat16", 128, capability) for capability in SHARED_LIMIT_BYTES),
    ("bfloat16", 64, 90),
    ("bfloat16", 256, 90),
    ("bfloat16", 256, 120),
    ("float32", 128, 90),
}


def _matrix() -> list[Any]:
    return [
        pytest.param(*case, marks=[] if case in _SUITE else [pytest.mark.full])
        for case in (
            (dtype, head_dim, capability)
            for dtype in _DTYPES
            for head_dim in _HEAD_DIMS
            for capability in SHARED_LIMIT_BYTES
        )
    ]


@pytest.mark.parametrize(("dtype", "head_dim", "capability"), _matrix())
def test_kernels_fit(dtype: Dtype, head_dim: int, capability: int) -> None:
    for kernel in (triton_compile.attend_decodes, triton_compile.attend_tiles):
        usage = kernel(dtype, head_dim, capability)
        assert usage.stack_bytes == 0
        assert usage.shared_bytes <= SHARED_LIMIT_BYTES[capability]


@pytest.mark.full
@pytest.mark.parametrize("group", [1, 7, 8])
@pytest.mark.parametrize("softcap", [False, True])
@pytest.mark.parametrize("capability", SHARED_LIMIT_BYTES)
def test_groups_and_softcaps_fit(group: int, softcap: bool, capability: int) -> None:
    for kernel in (triton_compile.attend_decodes, triton_compile.attend_tiles):
        for head_dim in (128, 256):
            usage = kernel("bfloat16", head_dim, capability, group=group, softcap=softcap)
            assert usage.stack_bytes == 0
            assert usage.shared_bytes <= SHARED_LIMIT_BYTES[capability]


@pytest.mark.parametrize("dtype", _DTYPES)
def test_small_kernels_compile(dtype: Dtype) -> None:
    for kernel in (triton_compile.write_kv, triton_compile.reduce_splits):
        usage = kernel(dtype, 128, 90)
        assert usage.stack_bytes == 0
        assert usage.shared_bytes <= 4096


@pytest.mark.parametrize("whole", [False, True], ids=["split", "whole"])
def test_decode_fetches_16_bytes_at_a_time_and_ahead(whole: bool) -> None:
    """Tiles of K and V come by asynchronous copies of 16 bytes, several tiles ahead."""
    ptx = triton_compile.attend_decodes("bfloat16", 128, 90, whole=whole).ptx
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*, (0x[0-9a-f]+|\d+)[;,]", ptx)
    assert copies
    assert {int(size, 0) for size in copies} == {16}
    waits = [int(left, 0) for left in re.findall(r"cp\.async\.wait_group\s+(\w+)", ptx)]
    assert max(waits) >= 2  # K and V of the tile after this one stay under way
