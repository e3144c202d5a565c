"""The inner loop of a matrix product, in LLVM's own language: a *tile* of a few rows times one
panel of weights, with all its sums in registers.

A *word* is what is multiplied at once in a lane: a float32, or two bfloat16 that follow each other
in a row, whose products are both added to a float32 (AVX512-BF16). A panel holds two vectors of 16
columns for every word of a row. For each word two vectors of weights are loaded, and one word of
each row is spread over all lanes; with twelve rows that is fourteen loads for 24 products, so the
products are what a CPU is busy with. While it computes with one panel it asks memory for the next.

Addresses are integers; `element` only gives the type of what rows and results are: float32, or
int16 for bfloat16.
"""

from collections.abc import Callable
from typing import Any, Final

from numba import types
from numba.extending import intrinsic

from pipemax.stage_worker.attention import vector_code as ll
from pipemax.stage_worker.attention.vector_code import Builder, Value

VECTORS: Final = 2
"""Of a panel."""
PANEL_COLUMNS: Final = VECTORS * ll.LANES
WORD_BYTES: Final = 4
LINE_BYTES: Final = 64
STEP_BYTES: Final = VECTORS * ll.VECTOR_BYTES
"""Of a panel, for one word of a row."""

_Sums = list[list[Value]]
"""By row and vector."""


def _make_tile(rows: int, gated: bool) -> Callable[..., Any]:
    @intrinsic  # type: ignore[untyped-decorator]
    def tile(
        typing_context: Any,
        element: Any,
        left: Any,
        left_bytes: Any,
        last: Any,
        words: Any,
        panel: Any,
        bias: Any,
        ahead: Any,
        ahead_bytes: Any,
        other: Any,
        out: Any,
        out_bytes: Any,
    ) -> Any:
        """Rows of `words` words from `left` on, `left_bytes` apart, times `panel`, plus the panel's
        `bias` (float32), plus what is at `other` unless that is 0, to `out`. Both are rows of
        elements, `out_bytes` apart. With `gated` the panel's first vector is an activation's: what
        comes out is silu(first) · second.

        `last` is the last row that there is: those after it are computed as copies of it. With
        every word two lines are prefetched, `ahead_bytes` further each time."""

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            left, left_bytes, last, words, panel, bias, ahead, ahead_bytes = args[1:9]
            other, out, out_bytes = args[9:]
            numbers = [_at_most(builder, row, last) for row in range(rows)]
            lefts = [builder.add(left, builder.mul(n, left_bytes)) for n in numbers]
            begin = [ll.load(builder, bias, v * ll.VECTOR_BYTES, ll.REALS) for v in range(VECTORS)]
            begins = [begin] * rows

            def weights(index: Value) -> list[Value]:
                coming = builder.add(ahead, builder.mul(index, ahead_bytes))
                for line in range(2):
                    ll.prefetch(builder, coming, line * LINE_BYTES)
                row = builder.add(panel, builder.mul(index, ll.ADDRESS(STEP_BYTES)))
                return [
                    ll.load(builder, row, v * ll.VECTOR_BYTES, ll.WORDS) for v in range(VECTORS)
                ]

            is_pairs = isinstance(element, types.Integer)
            sums = ll.accumulate(builder, is_pairs, lefts, words, begins, weights)
            if gated:
                sums = [[builder.fmul(_silu(builder, gate), up)] for gate, up in sums]
            places = [builder.mul(n, out_bytes) for n in numbers]
            sums = _plus(builder, sums, other, places, element)
            for place, row in zip(places, sums, strict=True):
                _store_row(builder, row, builder.add(out, place), element)
            return context.get_dummy_value()

        return types.void(element, *[types.intp] * 11), codegen

    return tile  # type: ignore[no-any-return]


def _at_most(builder: Builder, row: int, last: Value) -> Value:
    number = ll.ADDRESS(row)
    return builder.select(builder.icmp_signed("<", number, last), number, last)


def _silu(builder: Builder, x: Value) -> Value:
    """x / (1 + exp(-x)). Where exp would overflow the quotient is 0 all the same."""
    minus = builder.fsub(ll.reals_of(0.0), x)
    limited = builder.select(
        builder.fcmp_ordered("<", minus, ll.reals_of(87.0)), minus, ll.reals_of(87.0)
    )
    return builder.fdiv(x, builder.fadd(ll.reals_of(1.0), ll.exp(builder, limited)))


def _plus(builder: Builder, sums: _Sums, other: Value, places: list[Value], element: Any) -> _Sums:
    """`sums` and, unless `other` is 0, what is there."""
    without = builder.block
    adding, after = builder.append_basic_block(), builder.append_basic_block()
    builder.cbranch(builder.icmp_signed("!=", other, ll.ADDRESS(0)), adding, after)
    builder.position_at_end(adding)
    added = [
        [
            builder.fadd(total, _load_reals(builder, builder.add(other, place), v, element))
            for v, total in enumerate(row)
        ]
        for place, row in zip(places, sums, strict=True)
    ]
    builder.branch(after)
    builder.position_at_end(after)
    chosen: _Sums = []
    for row, more in zip(sums, added, strict=True):
        chosen.append([])
        for total, total_with in zip(row, more, strict=True):
            both = builder.phi(ll.REALS)
            both.add_incoming(total, without)
            both.add_incoming(total_with, adding)
            chosen[-1].append(both)
    return chosen


def _load_reals(builder: Builder, row: Value, vector: int, element: Any) -> Value:
    if element not in ll.WIDEN:
        return ll.load(builder, row, vector * ll.VECTOR_BYTES, ll.REALS)
    halves = ll.load(builder, row, vector * ll.VECTOR_BYTES // 2, ll.HALVES)
    return ll.WIDEN[element](builder, builder.zext(halves, ll.WORDS))


def _store_row(builder: Builder, reals: list[Value], row: Value, element: Any) -> None:
    for v, vector in enumerate(reals):
        if element not in ll.NARROW:
            ll.store(builder, vector, row, v * ll.VECTOR_BYTES)
            continue
        halves = builder.trunc(ll.NARROW[element](builder, vector), ll.HALVES)
        ll.store(builder, halves, row, v * ll.VECTOR_BYTES // 2)


tile_8, tile_12 = (_make_tile(rows, gated=False) for rows in (8, 12))
gated_8, gated_12 = (_make_tile(rows, gated=True) for rows in (8, 12))
