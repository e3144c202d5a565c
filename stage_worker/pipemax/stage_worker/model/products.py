"""Matrix products of a stage's rows with weights that lie in panels; see `product_code`.

Why not oneDNN's: it reads weights and multiplies one after the other, so that steps of 8 to 64
rows, which is what decoding is made of, run at 40 to 85 % of what the same cores reach here
(ops/benchmarks/LOG.md, 2026-11-22). On CPUs with a matrix unit (AMX) oneDNN uses that, and
`can_tile` says no.

Compiled functions stand in one file, as numba's cache notices changes of no other; see `compiled`.
"""

from typing import Any, Final, NamedTuple, TypeAlias

import numba
import numpy as np
import torch
from llvmlite import binding as llvm
from numba import prange

from pipemax.stage_worker.attention import vector_code
from pipemax.stage_worker.compiled import compiled, one_compiler_at_a_time
from pipemax.stage_worker.model import product_code
from pipemax.stage_worker.model.product_code import (
    PANEL_COLUMNS,
    STEP_BYTES,
    WORD_BYTES,
    gated_8,
    gated_12,
    tile_8,
    tile_12,
)

_ELEMENTS: Final = {torch.float32: np.float32(0), torch.bfloat16: np.int16(0)}
"""Of that type is what stands for an element in compiled code."""
_BLOCK_BYTES: Final = 200_000
"""Of rows that one panel after the other is multiplied with: they stay in the second level of
cache, beside two panels."""
_LEAST_BLOCK_ROWS: Final = 96
"""However long they are: with fewer, the weights would be read faster than memory gives them."""
_ALIAS_BYTES: Final = 1024
"""Rows so far apart fall into few sets of a cache."""
Place: TypeAlias = tuple[int, int, int, int, int, int, int, int, int, int, int]
"""What a tile takes, see `product_code`."""
_SOURCES: Final = (vector_code, product_code)


class Work(NamedTuple):
    """Rows to be multiplied, as compiled code takes them: addresses, and distances in bytes."""

    left: int
    rows: int
    left_bytes: int
    """From one row to the next."""
    words: int
    """Of a row."""
    panels: int
    bias: int
    other: int
    """What is added, rows as far apart as those of `out`; 0: nothing."""
    out: int
    out_bytes: int
    """From one row to the next."""
    column_bytes: int
    """Of a row of `out`, that come from one panel."""


def can_tile(dtype: torch.dtype) -> bool:
    """Whether products of `dtype` are faster here than by what torch has."""
    features = llvm.get_host_cpu_features()
    if dtype == torch.bfloat16:
        return vector_code.has_bfloat16_products() and not features.get("amx-bf16")
    return dtype == torch.float32 and bool(features.get("avx512f"))


def fits_panels(weight: torch.Tensor) -> bool:
    """Whether `weight` `[outputs, inputs]` has whole panels and words."""
    outputs, inputs = weight.shape
    return outputs % PANEL_COLUMNS == 0 and inputs * weight.element_size() % WORD_BYTES == 0


class TiledMatrix:
    """y = x·Wᵀ + b, of float32 or bfloat16; sums are float32 and rounded once, at the end."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """Copies `weight` `[outputs, inputs]` (`fits_panels`) and `bias` `[outputs]`."""
        self.outputs, self.inputs = weight.shape
        self._dtype = weight.dtype
        words = weight.contiguous().view(torch.int32)
        self._panels = words.view(-1, PANEL_COLUMNS, words.shape[1]).transpose(1, 2).contiguous()
        self._bias = torch.zeros(self.outputs) if bias is None else bias.float()
        self._gated = False

    @classmethod
    def gated(cls, gate: torch.Tensor, up: torch.Tensor) -> "TiledMatrix":
        """y = silu(x·gateᵀ) · (x·upᵀ), element by element, of two matrices of the same shape."""
        lanes = vector_code.LANES
        both = torch.stack(
            (gate.view(-1, lanes, gate.shape[1]), up.view(-1, lanes, up.shape[1])), 1
        )
        found = cls(both.view(-1, gate.shape[1]))
        found.outputs, found._gated = gate.shape[0], True
        return found

    def __call__(self, rows: torch.Tensor, other: torch.Tensor | None = None) -> torch.Tensor:
        """`rows` `[rows, inputs]` to `[rows, outputs]`, new; plus `other` of that shape."""
        rows = _apart(rows.contiguous())
        added = None if other is None else other.contiguous()
        out = torch.empty(rows.shape[0], self.outputs, dtype=self._dtype)
        work = Work(
            rows.data_ptr(),
            rows.shape[0],
            rows.stride(0) * rows.element_size(),
            self.inputs * rows.element_size() // WORD_BYTES,
            self._panels.data_ptr(),
            self._bias.data_ptr(),
            0 if added is None else added.data_ptr(),
            out.data_ptr(),
            self.outputs * out.element_size(),
            self.outputs // self._panels.shape[0] * out.element_size(),
        )
        threads, element = torch.get_num_threads(), _ELEMENTS[self._dtype]
        if threads == 1:
            _multiply(0, self._panels.shape[0], work, element, self._gated)
        else:
            numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
            _multiply_parallel(threads, self._panels.shape[0], work, element, self._gated)
        return out


def _apart(rows: torch.Tensor) -> torch.Tensor:
    """The same rows, a line further apart where they would fall into few sets of a cache."""
    row_bytes = rows.stride(0) * rows.element_size()
    if rows.shape[0] <= 8 or row_bytes % _ALIAS_BYTES:
        return rows
    extra = 64 // rows.element_size()
    room = torch.empty(rows.shape[0], rows.shape[1] + extra, dtype=rows.dtype)
    found = room[:, : rows.shape[1]]
    found.copy_(rows)
    return found


def warm_up(dtype: torch.dtype) -> None:
    """Compiles for `dtype` and the current number of threads, or loads what was compiled."""
    with one_compiler_at_a_time(_multiply):
        TiledMatrix(torch.zeros(PANEL_COLUMNS, 2, dtype=dtype))(torch.zeros(1, 2, dtype=dtype))


_compiled = compiled(*_SOURCES)


@_compiled
def _tile(element: Any, gated: bool, tall: bool, place: Place) -> None:
    """At most eight rows, or, `tall`, twelve, times one panel."""
    if gated and tall:
        gated_12(element, *place)
    elif gated:
        gated_8(element, *place)
    elif tall:
        tile_12(element, *place)
    else:
        tile_8(element, *place)


@_compiled
def _multiply(first_panel: int, end_panel: int, work: Work, element: Any, gated: bool) -> None:
    """Times panels `first_panel` up to `end_panel`, to the columns of `out` that are theirs."""
    panel_bytes = work.words * STEP_BYTES
    most = max(_LEAST_BLOCK_ROWS, _BLOCK_BYTES // (work.words * WORD_BYTES)) // 12 * 12
    for first in range(0, work.rows, most):
        count = min(most, work.rows - first)
        # Twelve rows a tile, and eight in one or two of them, so that few are computed twice.
        fours = max(2, (count + 3) // 4)
        low_tiles = -fours % 3
        tall_tiles = (fours - 2 * low_tiles) // 3
        tiles = tall_tiles + low_tiles
        share = 1 if tiles == 1 else 2
        for number in range(first_panel, end_panel):
            panel = work.panels + number * panel_bytes
            following = number + 1 if number + 1 < end_panel else first_panel
            columns = first * work.out_bytes + number * work.column_bytes
            row = 0
            for tile in range(tiles):
                # The first tile asks for the next panel, or the first two for half of it each.
                half = min(tile, share - 1) * (panel_bytes // share)
                tall = tile < tall_tiles
                place = (
                    work.left + (first + row) * work.left_bytes,
                    work.left_bytes,
                    min(12 if tall else 8, count - row) - 1,
                    work.words,
                    panel,
                    work.bias + number * PANEL_COLUMNS * 4,
                    work.panels + following * panel_bytes + half,
                    STEP_BYTES // share,
                    work.other + columns + row * work.out_bytes if work.other else 0,
                    work.out + columns + row * work.out_bytes,
                    work.out_bytes,
                )
                _tile(element, gated, tall, place)
                row += 12 if tall else 8


@compiled(*_SOURCES, parallel=True)
def _multiply_parallel(threads: int, end_panel: int, work: Work, element: Any, gated: bool) -> None:
    """As `_multiply` of all panels, a share of them in each thread."""
    for part in prange(threads):
        first, end = end_panel * part // threads, end_panel * (part + 1) // threads
        _multiply(first, end, work, element, gated)
