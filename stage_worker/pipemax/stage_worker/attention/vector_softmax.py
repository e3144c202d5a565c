"""Vector code between and behind the two products of `vectors`: scores to weights, sums to results.
See there for what `element` and `dot` are."""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from pipemax.stage_worker.attention import vector_ahead
from pipemax.stage_worker.attention import vector_code as ll
from pipemax.stage_worker.attention.vector_code import (
    LANES,
    Builder,
    Value,
)


def _reduced(builder: Builder, name: str, vector: Value, *before: Value) -> Value:
    return ll.call(builder, f"llvm.vector.reduce.{name}.v16f32", ll.REAL, *before, vector)


def _softcapped(builder: Builder, scores: list[Value], softcap: Value) -> list[Value]:
    """log2(e) · softcap · tanh(score / softcap), of scores times log2(e). tanh(x) =
    1 - 2 / (exp(2x) + 1), which beyond ±40 is ±1 in float32."""
    cap = builder.fmul(ll.splat(builder, softcap, ll.REALS), ll.reals_of(ll.LOG2_E))
    capped = []
    for score in scores:
        x = builder.fdiv(score, cap)
        for sign, limit in (("<", -40.0), (">", 40.0)):
            x = builder.select(
                builder.fcmp_ordered(sign, x, ll.reals_of(limit)), ll.reals_of(limit), x
            )
        e = ll.exp(builder, builder.fadd(x, x))
        part = builder.fdiv(ll.reals_of(2.0), builder.fadd(e, ll.reals_of(1.0)))
        capped.append(builder.fmul(cap, builder.fsub(ll.reals_of(1.0), part)))
    return capped


@intrinsic  # type: ignore[untyped-decorator]
def weigh(
    typing_context: Any,
    scores: Any,
    first: Any,
    end: Any,
    scaling: Any,
    softcap: Any,
    top: Any,
    total: Any,
    sums: Any,
    vectors: Any,
    walk: Any,
    dot: Any,
) -> Any:
    """Makes one query's scores of a tile its weights, in place: those of tokens `first` to `end`
    of the tile; others weigh nothing.

    A weight is exp(score - top), computed as a power of 2 of scores times log2(e), of which `top`
    (a float32's address) is the largest so far. When that rises, what was summed before is scaled
    down: `total` (16 lanes of the weights' sum) and `sums` (`vectors` vectors of values times
    weights). Weights are float32, or, with `dot`, bfloat16. Takes a step of `walk` with each
    vector.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        scores, first, end, scaling, softcap, top, total, sums, vectors, walk = args[:10]
        is_dot = isinstance(dot, types.Integer)
        scale = builder.fmul(ll.splat(builder, scaling, ll.REALS), ll.reals_of(ll.LOG2_E))
        kept = [cgutils.alloca_once(builder, ll.REALS) for _ in range(ll.TILE_VECTORS)]
        found = []
        for v in range(ll.TILE_VECTORS):
            found.append(
                builder.fmul(ll.load(builder, scores, v * ll.VECTOR_BYTES, ll.REALS), scale)
            )
            builder.store(found[-1], kept[v])
        with builder.if_then(
            builder.fcmp_ordered(">", softcap, ir.Constant(ll.REAL, 0.0)), likely=False
        ):
            for place, score in zip(kept, _softcapped(builder, found, softcap), strict=True):
                builder.store(score, place)
        seen, masked = _masked(builder, [builder.load(place) for place in kept], first, end)
        highest = masked[0]
        for score in masked[1:]:
            is_more = builder.fcmp_ordered(">", score, highest)
            highest = builder.select(is_more, score, highest)
        _raise_top(builder, highest, top, total, sums, vectors)
        highest = ll.splat(builder, ll.load(builder, top, 0, ll.REAL), ll.REALS)
        added = ll.load(builder, total, 0, ll.REALS)
        ahead = vector_ahead.Walk(builder, walk)
        for v, score in enumerate(masked):
            ahead.step()
            degree = 4 if is_dot else 7
            weight = ll.exp2(builder, builder.fsub(score, highest), degree)
            weight = builder.select(seen[v], weight, ll.reals_of(0.0))
            if is_dot:
                halves = ll.narrow_by_cpu(builder, weight)
                ll.store(builder, halves, scores, v * ll.VECTOR_BYTES // 2)
                weight = ll.widen_bfloat16(builder, builder.zext(halves, ll.WORDS))
            else:
                ll.store(builder, weight, scores, v * ll.VECTOR_BYTES)
            added = builder.fadd(added, weight)
        ll.store(builder, added, total, 0)
        ahead.leave()
        return context.get_dummy_value()

    where, real = types.intp, types.float32
    signature = types.void(where, where, where, real, real, where, where, where, where, where, dot)
    return signature, codegen


def _masked(
    builder: Builder, scores: list[Value], first: Value, end: Value
) -> tuple[list[Value], list[Value]]:
    """Which lanes count, and the scores with minus infinity in the others."""
    low, high = (ll.splat(builder, builder.trunc(at, ll.WORD), ll.WORDS) for at in (first, end))
    seen, masked = [], []
    for v, score in enumerate(scores):
        tokens = ir.Constant(ll.WORDS, list(range(v * LANES, (v + 1) * LANES)))
        inside = builder.and_(
            builder.icmp_signed(">=", tokens, low), builder.icmp_signed("<", tokens, high)
        )
        seen.append(inside)
        masked.append(builder.select(inside, score, ll.reals_of(float("-inf"))))
    return seen, masked


def _raise_top(
    builder: Builder, highest: Value, top: Value, total: Value, sums: Value, vectors: Value
) -> None:
    """Makes the largest lane of `highest` the top, if it is larger. See `weigh`."""
    before = ll.load(builder, top, 0, ll.REAL)
    more = builder.fcmp_ordered(">", highest, ll.splat(builder, before, ll.REALS))
    any_more = builder.icmp_unsigned(
        "!=", builder.bitcast(more, ir.IntType(LANES)), ir.Constant(ir.IntType(LANES), 0)
    )
    with builder.if_then(any_more, likely=False):
        now = _reduced(builder, "fmax", highest)
        factor = ll.exp2(builder, ll.splat(builder, builder.fsub(before, now), ll.REALS))
        ll.store(builder, now, top, 0)
        ll.store(builder, builder.fmul(ll.load(builder, total, 0, ll.REALS), factor), total, 0)
        with cgutils.for_range(builder, vectors) as loop:
            place = builder.add(sums, builder.mul(loop.index, ll.ADDRESS(ll.VECTOR_BYTES)))
            ll.store(builder, builder.fmul(ll.load(builder, place, 0, ll.REALS), factor), place, 0)


@intrinsic  # type: ignore[untyped-decorator]
def divide(
    typing_context: Any,
    sums: Any,
    total: Any,
    count: Any,
    target: Any,
    element: Any,
    dot: Any,
) -> Any:
    """Writes 32 numbers of `sums`, of which `count` are there, divided by the lanes of `total`
    together, as elements to `target`. With `dot` they lie as `_value_vectors` lays values out."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        sums, total, count, target = args[:4]
        nothing = ir.Constant(ll.REAL, -0.0)
        lanes = ll.load(builder, total, 0, ll.REALS)
        # Lanes may be summed in any order.
        kind = ir.FunctionType(ll.REAL, [ll.REAL, ll.REALS])
        reduce = cgutils.get_or_insert_function(
            builder.module, kind, "llvm.vector.reduce.fadd.v16f32"
        )
        whole = builder.call(reduce, [nothing, lanes], fastmath=("reassoc",))
        inverse = builder.fdiv(ir.Constant(ll.REAL, 1.0), whole)
        factor = ll.splat(builder, inverse, ll.REALS)
        pair = [
            builder.fmul(ll.load(builder, sums, v * ll.VECTOR_BYTES, ll.REALS), factor)
            for v in range(2)
        ]
        if element not in ll.NARROW:
            for v, numbers in enumerate(pair):
                left = builder.sub(count, ll.ADDRESS(v * LANES))
                place = builder.add(target, ll.ADDRESS(v * ll.VECTOR_BYTES))
                ll.store_part(builder, builder.bitcast(numbers, ll.WORDS), place, left)
            return context.get_dummy_value()
        order = list(range(2 * LANES))
        if isinstance(dot, types.Integer):
            order = [
                half * LANES + 4 * eight + lane
                for eight in range(4)
                for half in range(2)
                for lane in range(4)
            ]
        words = [ll.NARROW[element](builder, numbers) for numbers in pair]
        halves = [builder.trunc(word, ll.HALVES) for word in words]
        ll.store_part(builder, ll.shuffle(builder, halves[0], halves[1], order), target, count)
        return context.get_dummy_value()

    where = types.intp
    return types.void(where, where, where, where, element, dot), codegen
