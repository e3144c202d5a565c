"""Random steps over a paged pool, with what attention must give for them in float64.

Made to run anywhere: against Triton's interpreter on a CPU, and against every backend on a GPU.
Nothing outside of what a step may read is harmless: the pool is NaN where no token of an item is,
and so are the queries of padding rows, whose K and V are huge.
"""

import random
from dataclasses import dataclass, field

import numpy as np
import torch

from pipemax.proto.geometry import BlockGeometry, Dtype
from pipemax.stage_worker.attention.device.base import AttentionBackend
from pipemax.stage_worker.attention.device.batch import DeviceStep, view_batch
from pipemax.stage_worker.attention.device.layout import BatchLayout, pack_step, tile_tokens
from pipemax.stage_worker.dtypes import torch_dtype
from pipemax.stage_worker.plan_columns import read_columns
from support.paged_run import Item, step_plan

LENGTHS = (1, 15, 16, 17, 33, 100)
DECODES = tuple((1, length - 1) for length in LENGTHS)
MIXED = ((1, 32), (33, 0), (1, 0), (17, 16), (2, 99), (100, 0), (1, 99), (16, 1))
"""(new tokens, tokens before them) of each item."""


@dataclass(frozen=True)
class Case:
    """One call of attention."""

    dtype: Dtype = "float32"
    items: tuple[tuple[int, int], ...] = MIXED
    """(new tokens, tokens before them)"""
    kv_heads: int = 2
    group: int = 2
    """Heads that share a KV head."""
    head_dim: int = 64
    block_size: int = 16
    window: int = 0
    softcap: float = 0.0
    padding: int = 0
    """Rows too many, as in a CUDA graph's buffers; only where every item has one token."""
    seed: int = 0

    def __str__(self) -> str:
        parts = [self.dtype, f"{self.kv_heads}x{self.group} heads of {self.head_dim}"]
        parts += [f"blocks of {self.block_size}", f"{len(self.items)} items"]
        parts += [f"{name} {getattr(self, name)}" for name in _OPTIONS if getattr(self, name)]
        return ", ".join(parts)


_OPTIONS = ("window", "softcap", "padding")

CASES = (
    *(Case(dtype=dtype) for dtype in ("float32", "bfloat16", "float16")),
    *(Case(dtype=dtype, items=DECODES) for dtype in ("float32", "bfloat16", "float16")),
    *(Case("bfloat16", kv_heads=kv, group=group) for kv, group in ((8, 1), (2, 4), (1, 7), (2, 8))),
    *(Case("bfloat16", head_dim=head_dim) for head_dim in (80, 96, 128, 256)),
    *(Case("float32", head_dim=head_dim) for head_dim in (8, 16, 128, 256)),
    *(Case("bfloat16", block_size=block_size) for block_size in (1, 8, 24, 32, 64, 256)),
    *(Case("bfloat16", window=window) for window in (1, 15, 16, 40, 1000)),
    *(Case("float32", window=window, softcap=30.0) for window in (17, 64)),
    Case("float16", softcap=5.0, group=4, head_dim=128),
    Case("bfloat16", DECODES, padding=3, group=4, head_dim=128),
    Case("float32", DECODES, padding=10, window=20),
    Case("bfloat16", ((1, 999), (1, 2047), (1, 0), (1, 511)), group=4, head_dim=128),
    Case("bfloat16", ((1, 999), (1, 2047), (1, 0), (1, 511)), group=4, head_dim=128, window=300),
    Case("bfloat16", ((1, 999), (300, 400), (257, 0)), group=4, head_dim=128, window=200),
)
"""Every dtype with decodes and with mixed steps, and each thing that can vary on its own."""

TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2, "float16": 3e-3}
"""Absolute and relative, of outputs whose size is about one."""


@dataclass
class Prepared:
    """A case's tensors on a device."""

    case: Case
    step: DeviceStep
    pool: torch.Tensor
    """Before the step: NaN but for the tokens before the items' new ones."""
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    expected: torch.Tensor
    """float64 `[rows, heads, head_dim]`, zeros for padding."""
    pool_after: torch.Tensor = field(repr=False)

    LAYER = 1
    SCALING = 0.2


def prepare(case: Case, device: torch.device) -> Prepared:
    """The same numbers for the same case, whatever the device."""
    rng = random.Random(case.seed)
    geometry = BlockGeometry(3, case.block_size, case.kv_heads, case.head_dim, case.dtype)
    counts = [-(-(new + old) // case.block_size) for new, old in case.items]
    ids = rng.sample(range(sum(counts) + 5), sum(counts))  # scattered, with some of no item
    items, given = [], iter(ids)
    for (new, old), count in zip(case.items, counts, strict=True):
        tokens = [rng.randrange(100) for _ in range(new)]
        items.append(Item(tokens, old, [next(given) for _ in range(count)]))
    columns = read_columns(step_plan(items), case.block_size)
    tile = tile_tokens(case.group, 1, torch_dtype(case.dtype).itemsize)
    layout = BatchLayout.of_step(columns, tile)
    if case.padding:
        layout = BatchLayout.of_decodes(layout.rows + case.padding, layout.table_blocks + 7)
    buffer = np.full(layout.num_bytes, 0x7F, np.uint8)
    pack_step(columns, layout, tile, buffer)
    step = DeviceStep(view_batch(torch.from_numpy(buffer).to(device), layout), columns)

    generator = torch.Generator().manual_seed(case.seed)
    dtype, rows = torch_dtype(case.dtype), columns.token_ids.shape[0]

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    def heads_first(count: int, padding: float) -> torch.Tensor:
        """`[rows, count, head_dim]` laid out as models give it."""
        numbers = draw(count, layout.rows, case.head_dim)
        numbers[:, rows:] = padding
        return numbers.to(device).transpose(0, 1)

    query = heads_first(case.kv_heads * case.group, torch.nan)
    # Not NaN: written anywhere in the pool it would not show.
    key, value = heads_first(case.kv_heads, 1e4), heads_first(case.kv_heads, 1e4)
    pool = torch.full((sum(counts) + 5, *geometry.block_shape), torch.nan, dtype=dtype)
    for item, (_, old) in zip(items, case.items, strict=True):
        for token in range(old):
            block, offset = item.blocks[token // case.block_size], token % case.block_size
            pool[block, :, :, offset] = draw(3, 2, case.kv_heads, case.head_dim)
    pool_after = pool.clone()
    for row, slot in enumerate(columns.slots.tolist()):
        block, offset = divmod(slot, case.block_size)
        pool_after[block, Prepared.LAYER, 0, offset] = key[row].cpu()
        pool_after[block, Prepared.LAYER, 1, offset] = value[row].cpu()
    expected = torch.zeros(layout.rows, *query.shape[1:], dtype=torch.float64)
    for index, item in enumerate(items):
        span = slice(int(columns.row_starts[index]), int(columns.row_ends[index]))
        expected[span] = attend_in_float64(case, item, pool_after, query[span].cpu())
    return Prepared(
        case, step, pool.to(device), query, key, value, expected.to(device), pool_after.to(device)
    )


def attend_in_float64(
    case: Case, item: Item, pool: torch.Tensor, query: torch.Tensor
) -> torch.Tensor:
    """One item, by the definition, token by token."""
    length = item.context_len + len(item.tokens)
    at = torch.arange(length)
    blocks = torch.tensor(item.blocks)[at // case.block_size]
    tokens = pool[blocks, Prepared.LAYER, :, at % case.block_size].double()
    keys, values = tokens.repeat_interleave(case.group, dim=2).unbind(1)  # [length, heads, dim]
    out = torch.empty(query.shape, dtype=torch.float64)
    for index in range(len(item.tokens)):
        position = item.context_len + index
        first = max(0, position + 1 - case.window) if case.window else 0
        seen = slice(first, position + 1)
        scores = torch.einsum("hd,thd->ht", query[index].double(), keys[seen]) * Prepared.SCALING
        if case.softcap:
            scores = case.softcap * torch.tanh(scores / case.softcap)
        out[index] = torch.einsum("ht,thd->hd", torch.softmax(scores, dim=1), values[seen])
    return out


def run(
    backend: AttentionBackend, prepared: Prepared, pool: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output of one step, and the pool after it: `pool` itself, or a copy of the case's."""
    pool = prepared.pool.clone() if pool is None else pool
    backend.bind_pool(pool)
    backend.plan(prepared.step)
    out = backend.attend(
        prepared.step,
        Prepared.LAYER,
        prepared.query,
        prepared.key,
        prepared.value,
        scaling=Prepared.SCALING,
        window=prepared.case.window,
        softcap=prepared.case.softcap,
    )
    return out, pool


def check(backend: AttentionBackend, case: Case, device: torch.device) -> float:
    """The largest error of a backend's output. Raises AssertionError when an output is wrong, or
    the pool is not what it should be, bit by bit."""
    prepared = prepare(case, device)
    return _compare(prepared, *run(backend, prepared))


def check_far_blocks(backend: AttentionBackend, device: torch.device) -> float:
    """As `check`, at the end of a pool of more than 2^31 numbers: 4.3 GB of address space, of which
    a CPU touches a few pages."""
    prepared = prepare(Case("float16", ((1, 40), (20, 13), (1, 0))), device)
    near, *block = prepared.pool.shape
    before = 2**31 // prepared.pool[0].numel() + 1
    pool = torch.empty((before + near, *block), dtype=prepared.pool.dtype, device=device)
    pool[before:] = prepared.pool
    prepared.step.batch.block_tables.add_(before)
    prepared.step.batch.slots.add_(before * prepared.case.block_size)
    out, _ = run(backend, prepared, pool)
    return _compare(prepared, out, pool[before:])


def _compare(prepared: Prepared, out: torch.Tensor, pool: torch.Tensor) -> float:
    case = prepared.case
    assert out.dtype == torch_dtype(case.dtype)
    as_bits = torch.int32 if case.dtype == "float32" else torch.int16
    assert torch.equal(pool.view(as_bits), prepared.pool_after.view(as_bits)), f"pool: {case}"
    tolerance = TOLERANCE[case.dtype]
    torch.testing.assert_close(
        out.double(),
        prepared.expected,
        atol=tolerance,
        rtol=tolerance,
        msg=lambda text: f"{case}: {text}",
    )
    return float((out.double() - prepared.expected).abs().max())
