"""The compiled and gathered forms of paged attention against the plain one."""

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import numba
import numpy as np
import pytest
import torch
from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from pipemax.proto.errors import InvariantError
from pipemax.proto.geometry import BlockGeometry, Dtype
from pipemax.stage_worker import compiled
from pipemax.stage_worker.attention import kernels, paged, rotation
from pipemax.stage_worker.attention.elements import of_float32
from pipemax.stage_worker.attention.interface import HeadNorm, Rotary
from pipemax.stage_worker.attention.paged import Backend, PagedAttention
from pipemax.stage_worker.batch import Runs, StepBatch, prepare_batch
from pipemax.stage_worker.compiled import cache_folder
from support.paged_run import Item, step_plan

_NUM_BLOCKS = 700
# (new tokens, tokens before them): decode, short and long prompts, chunks, small and large
_SHAPES = [(1, 0), (1, 15), (1, 16), (1, 130), (4, 60), (7, 0), (90, 0), (33, 50), (5, 100), (3, 1)]
_TORCH: dict[Dtype, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _batch(block_size: int) -> StepBatch:
    ids = random.Random(3).sample(range(_NUM_BLOCKS), _NUM_BLOCKS)
    items = [
        Item([0] * new, old, [ids.pop() for _ in range(-(-(new + old) // block_size))])
        for new, old in _SHAPES
    ]
    return prepare_batch(step_plan(items), block_size)


def _outputs(
    dtype: Dtype,
    *,
    block_size: int = 8,
    kv_heads: int = 2,
    group: int = 2,
    head_dim: int = 16,
    window: int = 0,
    softcap: float = 0.0,
    found_by: Backend = "kernel",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output and pool of the kernel backend, then of the reference."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(_TORCH[dtype])

    geometry = BlockGeometry(3, block_size, kv_heads, head_dim, dtype)
    batch = _batch(block_size)
    filled = draw(_NUM_BLOCKS, *geometry.block_shape)
    tokens = batch.num_tokens
    query = draw(tokens, kv_heads * group, head_dim)
    key, value = draw(tokens, kv_heads, head_dim), draw(tokens, kv_heads, head_dim)
    results = []
    for backend in (found_by, "reference"):
        attention = PagedAttention(geometry, _TORCH[dtype], backend)
        pool = filled.clone()
        attention.bind_pool(pool)
        attention.begin(batch)
        results += [attention.attend(1, query, key, value, 0.3, window, softcap), pool]
    return results[0], results[1], results[2], results[3]


def _check(dtype: Dtype, **settings: Any) -> None:
    found, pool, expected, reference_pool = _outputs(dtype, **settings)
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    if settings.get("head_dim", 0) > 128:  # longer sums
        tolerance *= 2
    assert found.dtype == _TORCH[dtype]
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
    assert torch.equal(pool, reference_pool)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("window", [0, 1, 13, 32, 1000])
@pytest.mark.parametrize("softcap", [0.0, 1.5])
def test_windows_and_softcaps(dtype: Dtype, window: int, softcap: float) -> None:
    _check(dtype, window=window, softcap=softcap)


@pytest.mark.parametrize("block_size", [1, 3, 16, 64])
@pytest.mark.parametrize("head_dim", [8, 24, 80, 100, 256])
def test_block_sizes_and_head_sizes(block_size: int, head_dim: int) -> None:
    _check("float32", block_size=block_size, head_dim=head_dim)


@pytest.mark.parametrize(("kv_heads", "group"), [(1, 1), (1, 8), (4, 1), (2, 3)])
def test_grouped_heads(kv_heads: int, group: int) -> None:
    _check("float32", kv_heads=kv_heads, group=group)
    _check("bfloat16", kv_heads=kv_heads, group=group)


@pytest.mark.parametrize("head_dim", [8, 24, 80, 100, 256])
def test_head_sizes_of_bfloat16_with_and_without_products_of_it(head_dim: int) -> None:
    for found_by in ("kernel", "widening_kernel"):
        _check("bfloat16", head_dim=head_dim, group=3, found_by=found_by)


@pytest.mark.parametrize(
    "dtype",
    [
        # For each, the compiler takes its time over a form with threads.
        "float32",
        pytest.param("bfloat16", marks=pytest.mark.full),
        pytest.param("float16", marks=pytest.mark.full),
    ],
)
@pytest.mark.parametrize("count", [1, 2])
def test_threads_change_nothing(dtype: Dtype, count: int) -> None:
    with threads(count):
        _check(dtype, window=32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_kv_is_written_to_its_slots_only(dtype: Dtype) -> None:
    geometry = BlockGeometry(3, 8, 2, 16, dtype)
    attention = PagedAttention(geometry, _TORCH[dtype], "kernel")
    pool = torch.zeros(_NUM_BLOCKS, *geometry.block_shape, dtype=_TORCH[dtype])
    attention.bind_pool(pool)
    batch = _batch(8)
    key = torch.randn(batch.num_tokens, 2, 16).to(_TORCH[dtype])
    value = torch.randn(batch.num_tokens, 2, 16).to(_TORCH[dtype])
    attention.begin(batch)
    attention.attend(1, torch.zeros(batch.num_tokens, 4, 16).to(key), key, value, 1.0, 0, 0.0)
    expected = torch.zeros_like(pool)
    for row, slot in enumerate(batch.slots):
        expected[slot // 8, 1, 0, slot % 8] = key[row]
        expected[slot // 8, 1, 1, slot % 8] = value[row]
    assert torch.equal(pool, expected)


def _like_transformers(
    qkv: torch.Tensor, heads: int, kv_heads: int, rotary: Rotary, norm: HeadNorm | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value as transformers' modules make them."""
    query, key, value = qkv.unflatten(1, (heads + 2 * kv_heads, -1)).split(
        [heads, kv_heads, kv_heads], dim=1
    )
    if norm is not None:
        made = []
        for states, weight in ((query, norm.query_weight), (key, norm.key_weight)):
            module = Qwen3RMSNorm(states.shape[2], norm.eps)
            module.weight.data = weight
            made.append(module(states))
        query, key = made
    cos, sin = rotary.cos.to(qkv.dtype)[None], rotary.sin.to(qkv.dtype)[None]
    query, key = apply_rotary_pos_emb(query[None], key[None], cos, sin, unsqueeze_dim=2)
    return query[0], key[0], value


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("width", [16, 6])
@pytest.mark.parametrize("normed", [False, True])
@torch.inference_mode()
def test_a_fused_projection_is_attended_to_as_its_parts_are(
    dtype: Dtype, width: int, normed: bool
) -> None:
    torch.manual_seed(0)
    heads, kv_heads, head_dim = 6, 2, 16
    geometry = BlockGeometry(3, 8, kv_heads, head_dim, dtype)
    batch = _batch(8)
    qkv = (torch.randn(batch.num_tokens, (heads + 2 * kv_heads) * head_dim)).to(_TORCH[dtype])
    angles = torch.randn(batch.num_tokens, width)
    rotary = Rotary(angles.cos(), angles.sin())
    weights = torch.randn(2, head_dim).to(_TORCH[dtype])
    norm = HeadNorm(weights[0], weights[1], 1e-5) if normed else None
    settings = {"scaling": 0.3, "window": 30, "head_norm": norm}
    query, key, value = _like_transformers(qkv, heads, kv_heads, rotary, norm)
    filled = torch.randn(_NUM_BLOCKS, *geometry.block_shape).to(_TORCH[dtype])
    for backend in ("kernel", "reference"):
        whole, parts = (PagedAttention(geometry, _TORCH[dtype], backend) for _ in range(2))
        pools = filled.clone(), filled.clone()
        for attention, pool in zip((whole, parts), pools, strict=True):
            attention.bind_pool(pool)
            attention.begin(batch)
        found = whole.attend_packed(1, qkv.clone(), rotary, **settings)
        expected = parts.attend(1, query, key, value, 0.3, 30, 0.0).flatten(1)
        assert found.dtype == _TORCH[dtype]
        close = {"atol": 1e-5, "rtol": 1e-5} if dtype == "float32" else {"atol": 2e-2, "rtol": 2e-2}
        torch.testing.assert_close(found, expected, **close)
        if normed:  # a mean's sum may be taken in another order
            torch.testing.assert_close(pools[0], pools[1], **close)
        else:
            assert torch.equal(pools[0], pools[1])


def test_a_fused_projection_that_does_not_fit_is_refused() -> None:
    attention = PagedAttention(BlockGeometry(1, 8, 2, 8, "float32"), torch.float32, "kernel")
    attention.bind_pool(torch.zeros(1, 1, 2, 8, 2, 8))
    attention.begin(prepare_batch(step_plan([Item([0], 0, [0])]), 8))
    flat, good = torch.zeros(1, 8), torch.zeros(1, 48)
    rotary = Rotary(flat, flat)
    attention.attend_packed(0, good, rotary, scaling=1.0, window=0)
    for bad in (good[:, :40], torch.zeros(2, 48), good.double(), torch.zeros(1, 44)):
        with pytest.raises(InvariantError, match="queries, keys and values of shape"):
            attention.attend_packed(0, bad, rotary, scaling=1.0, window=0)
    for angles in (torch.zeros(2, 8), torch.zeros(1, 10), torch.zeros(1, 3)):
        with pytest.raises(InvariantError, match="a rotation of shape"):
            attention.attend_packed(0, good, Rotary(angles, angles), scaling=1.0, window=0)
    norm = HeadNorm(torch.zeros(4), torch.zeros(4), 1e-5)
    with pytest.raises(InvariantError, match="norms of shape"):
        attention.attend_packed(0, good, rotary, scaling=1.0, window=0, head_norm=norm)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers_are_narrowed_as_torch_does(dtype: torch.dtype) -> None:
    """Through a rotation by nothing, with numbers of all magnitudes: what a half cannot hold, what
    lies between two, ties, subnormals, infinities."""
    bits = torch.arange(0, 2**32, 65521, dtype=torch.int64)
    numbers = torch.cat([bits.to(torch.int32).view(torch.float32), _ties(dtype)])
    element = paged.pool_array(torch.zeros(1, dtype=dtype))

    @numba.njit  # type: ignore[untyped-decorator]
    def narrowed(numbers: Any, element: Any) -> Any:
        out = np.empty(numbers.shape[0], element.dtype)
        for index in range(numbers.shape[0]):
            out[index] = of_float32(numbers[index], element[0])
        return out

    found = narrowed(numbers.numpy(), element)
    expected = numbers.to(dtype)
    torch.testing.assert_close(
        torch.from_numpy(found.view(np.int16)).view(dtype), expected, atol=0, rtol=0, equal_nan=True
    )


def _ties(dtype: torch.dtype) -> torch.Tensor:
    """Half-way between neighbouring halves."""
    low = torch.arange(0, 0x7B00, 7, dtype=torch.int16)
    return (low.view(dtype).float() + (low + 1).view(dtype).float()) / 2


def test_softmax_of_large_scores_does_not_overflow() -> None:
    """One key far above the others takes all the weight."""
    geometry = BlockGeometry(1, 8, 1, 8, "float32")
    attention = PagedAttention(geometry, torch.float32, "kernel")
    pool = torch.zeros(1, *geometry.block_shape)
    pool[0, 0, 0, 2], pool[0, 0, 1, 2] = 500.0, 7.0
    attention.bind_pool(pool)
    attention.begin(prepare_batch(step_plan([Item([0], 5, [0])]), 8))
    one = torch.ones(1, 1, 8)
    out = attention.attend(0, one, 0 * one, 0 * one, 1.0, 0, 0.0)
    assert torch.equal(out, 7.0 * one)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_finite_half_is_widened_exactly(dtype: torch.dtype) -> None:
    """All 2^16 bit patterns, read through the kernel as the value of a single key."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    numbers = bits.view(dtype)
    finite = torch.isfinite(numbers)
    pool = torch.zeros(2**12, 1, 2, 1, 1, 16, dtype=dtype)
    pool[:, 0, 1, 0, 0] = torch.where(finite, numbers, torch.zeros((), dtype=dtype)).view(-1, 16)
    rows = np.arange(2**12, dtype=np.int32)
    out = torch.empty(2**12, 1, 16, dtype=dtype)
    kernels.attend(
        paged.pool_array(pool),
        0,
        paged.pool_array(torch.zeros(2**12, 1, 16, dtype=dtype)),
        1,
        Runs(rows.astype(np.int64), np.ones_like(rows), np.zeros_like(rows), rows, rows),
        scaling=1.0,
        softcap=0.0,
        window=0,
        out=paged.pool_array(out),
        threads=1,
        pairs=False,
    )
    expected = torch.where(finite, numbers.float(), 0.0)
    torch.testing.assert_close(out.float().flatten(), expected, atol=0, rtol=0)


def test_attention_outside_a_step_is_refused() -> None:
    attention = PagedAttention(BlockGeometry(1, 8, 1, 8, "float32"), torch.float32, "kernel")
    one = torch.ones(1, 1, 8)
    with pytest.raises(InvariantError, match="outside a step"):
        attention.attend(0, one, one, one, 1.0, 0, 0.0)


def test_keys_that_do_not_fit_the_pool_are_refused() -> None:
    geometry = BlockGeometry(1, 8, 2, 8, "float32")
    attention = PagedAttention(geometry, torch.float32, "kernel")
    attention.bind_pool(torch.zeros(1, *geometry.block_shape))
    attention.begin(prepare_batch(step_plan([Item([0], 0, [0])]), 8))
    good = torch.ones(1, 2, 8)
    attention.attend(0, good, good, good, 1.0, 0, 0.0)
    for bad in (torch.ones(2, 2, 8), torch.ones(1, 3, 8), torch.ones(1, 2, 16)):
        with pytest.raises(InvariantError, match="K of shape"):
            attention.attend(0, good, bad, good, 1.0, 0, 0.0)
        with pytest.raises(InvariantError, match="and V of"):
            attention.attend(0, good, good, bad, 1.0, 0, 0.0)


def test_masks_and_dropout_are_refused() -> None:
    one = torch.ones(1, 1, 1, 8)
    module = torch.nn.Module()
    with pytest.raises(InvariantError, match="neither a mask nor dropout"):
        paged.paged_attention(module, one, one, one, one, 1.0)
    with pytest.raises(InvariantError, match="neither a mask nor dropout"):
        paged.paged_attention(module, one, one, one, None, 1.0, dropout=0.1)


@pytest.mark.parametrize("dtype", list(_TORCH.values()))
def test_warm_up_compiles_what_a_step_calls(dtype: torch.dtype) -> None:
    paged.warm_up(dtype)
    compiled = len(kernels.attend_part.signatures), len(rotation.write_kv.signatures)
    _outputs({value: key for key, value in _TORCH.items()}[dtype])
    assert (len(kernels.attend_part.signatures), len(rotation.write_kv.signatures)) == compiled


def test_kernels_are_kept_in_a_private_folder() -> None:
    paged.warm_up(torch.float32)
    folder = cache_folder(kernels.attend_part)
    assert folder is not None
    assert list(folder.glob("kernels.attend_part-*.nbi"))
    assert folder.stat().st_mode & 0o002 == 0


def test_without_a_folder_to_cache_in_kernels_are_compiled_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def njit(*, cache: bool = False, **options: Any) -> Callable[[Any], Any]:
        if cache:
            raise RuntimeError("cannot cache function: no locator available")  # as numba does
        return numba.njit(**options)

    monkeypatch.setattr(compiled, "njit", njit)
    twice = compiled.compiled()(lambda x: 2 * x)
    assert twice(4) == 8
    assert twice.signatures
