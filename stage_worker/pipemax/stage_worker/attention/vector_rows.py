"""Vector code that multiplies up to four queries with keys as they lie in the pool: for decodes,
for which packing keys (see `vectors`) would cost more than multiplying them.

Four words of a token's key are loaded to each quarter of a vector, and multiplied with a vector
that holds those four words of four queries. After all words, a token's vector holds four parts of
each of its four scores; those of sixteen tokens are added up together.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from pipemax.stage_worker.attention import vector_ahead
from pipemax.stage_worker.attention import vector_code as ll
from pipemax.stage_worker.attention.vector_code import LANES, Builder, Value

QUARTER = LANES // 4


def _quarters(builder: Builder, address: Value, element: Any, dot: bool) -> Value:
    """Four words at an address, four times."""
    four = list(range(QUARTER)) * 4
    if element not in ll.WIDEN or dot:
        words = ll.load(builder, address, 0, ir.VectorType(ll.WORD, QUARTER))
        return ll.shuffle(builder, words, words, four)
    halves = ll.load(builder, address, 0, ir.VectorType(ll.HALF, QUARTER))
    words = builder.zext(halves, ir.VectorType(ll.WORD, QUARTER))
    widened = ll.WIDEN[element](builder, ll.shuffle(builder, words, words, four))
    return builder.bitcast(widened, ll.WORDS)


def _within_quarters(first: list[int]) -> list[int]:
    """Lanes of each quarter, given those of the first; 4 and more are of the second vector."""
    return [
        4 * quarter + (lane if lane < QUARTER else LANES + lane - QUARTER)
        for quarter in range(4)
        for lane in first
    ]


def _added_pairs(builder: Builder, a: Value, b: Value, width: int) -> Value:
    """Halves of each quarter of two vectors added: `width` 1 leaves two parts each of a and b, in
    turns, 2 one of four."""
    low, high = ([0, 4, 1, 5], [2, 6, 3, 7]) if width == 1 else ([0, 1, 4, 5], [2, 3, 6, 7])
    return builder.fadd(
        ll.shuffle(builder, a, b, _within_quarters(low)),
        ll.shuffle(builder, a, b, _within_quarters(high)),
    )


def _scores(builder: Builder, totals: list[Value]) -> list[Value]:
    """Four vectors, one per query, of 16 tokens' scores, from 16 vectors, one per token, with four
    parts of each query's score."""
    fours = []
    for token in range(0, LANES, 4):
        a, b, c, d = totals[token : token + 4]
        pairs = _added_pairs(builder, a, b, 1), _added_pairs(builder, c, d, 1)
        fours.append(_added_pairs(builder, *pairs, 2))
    # fours[i] holds, query by query, the scores of tokens 4i to 4i + 3.
    found = []
    for half in (0, 8):
        lanes = [*range(half, half + 8), *range(LANES + half, LANES + half + 8)]
        left, right = (ll.shuffle(builder, fours[i], fours[i + 1], lanes) for i in (0, 2))
        for query in (0, 4):
            picked = [query + lane + 8 * part for part in (0, 1, 2, 3) for lane in range(4)]
            found.append(ll.shuffle(builder, left, right, picked))
    return found


@intrinsic  # type: ignore[untyped-decorator]
def score_rows(
    typing_context: Any,
    quads: Any,
    steps: Any,
    tokens: Any,
    offset: Any,
    scores: Any,
    walk: Any,
    element: Any,
    dot: Any,
) -> Any:
    """Scores of 16 tokens, whose keys are at `offset` bytes of the addresses at `tokens`, by four
    queries. `quads`: their words, four of each query at a time, `steps` times. To 16 lanes of each
    of four rows at `scores`. Each step takes one of `walk`, too."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        quads, steps, tokens, offset, scores, walk = args[:6]
        is_dot = isinstance(dot, types.Integer)
        step_bytes = 8 if element in ll.WIDEN and not is_dot else 16
        ahead = vector_ahead.Walk(builder, walk)
        rows = [
            builder.add(ll.load(builder, tokens, 8 * token, ll.ADDRESS), offset)
            for token in range(LANES)
        ]
        totals = [cgutils.alloca_once_value(builder, ll.reals_of(0.0)) for _ in rows]
        with cgutils.for_range(builder, steps) as loop:
            ahead.step()
            query = builder.add(quads, builder.mul(loop.index, ll.ADDRESS(ll.VECTOR_BYTES)))
            left = ll.load(builder, query, 0, ll.WORDS)
            at = builder.mul(loop.index, ll.ADDRESS(step_bytes))
            for row, place in zip(rows, totals, strict=True):
                keys = _quarters(builder, builder.add(row, at), element, is_dot)
                total = ll.product(builder, is_dot, left, keys, builder.load(place))
                builder.store(total, place)
        ahead.leave()
        found = _scores(builder, [builder.load(place) for place in totals])
        for query_index, vector in enumerate(found):
            ll.store(builder, vector, scores, query_index * ll.ROW_BYTES)
        return context.get_dummy_value()

    where = types.intp
    return types.void(where, where, where, where, where, where, element, dot), codegen
