"""Vector code that asks for what comes next: a walk over the rows of KV of the next tile, some
lines at a time, which goes on from one loop to the next.

Memory answers best when it is always asked for a little more: a loop that computes takes a step of
the walk with each of its turns, and what is left when a tile ends is asked for at once. A CPU drops
what it is asked for while too much is under way, so that it is worth asking for all of it twice.
The walk is some words of memory, which loops keep in registers while they run; see `WALK`.
"""

from typing import Any, Final

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from pipemax.stage_worker.attention import vector_code as ll
from pipemax.stage_worker.attention.vector_code import Builder, Value

LINE_BYTES: Final = 64
STEP_LINES: Final = 4
"""That are asked for with each turn of a loop: with so many, loops over keys and over values have
asked for as much as they read when they end."""
STEP_BYTES: Final = STEP_LINES * LINE_BYTES
WALK: Final = 4
"""Words of a walk: where the next row's address stands, bytes of that row that were asked for, a
row's bytes, and where the list of addresses ends. The list has one address more, of which lines are
asked for when there is nothing else to do."""


class Walk:
    """A walk in a loop's registers."""

    def __init__(self, builder: Builder, address: Value) -> None:
        self._builder, self._address = builder, address
        words = [ll.load(builder, address, 8 * word, ll.ADDRESS) for word in range(WALK)]
        self._at, self._done = (cgutils.alloca_once_value(builder, word) for word in words[:2])
        self._row_bytes, self._end = words[2:]

    def step(self) -> None:
        """Asks for the next lines."""
        builder = self._builder
        at, done = builder.load(self._at), builder.load(self._done)
        row = builder.add(ll.load(builder, at, 0, ll.ADDRESS), done)
        for line in range(STEP_LINES):
            ll.prefetch(builder, row, line * LINE_BYTES)
        further = builder.add(done, ll.ADDRESS(STEP_BYTES))
        row_ends = builder.icmp_signed(">=", further, self._row_bytes)
        goes_on = builder.and_(row_ends, builder.icmp_signed("<", at, self._end))
        next_at = builder.select(goes_on, builder.add(at, ll.ADDRESS(8)), at)
        builder.store(next_at, self._at)
        builder.store(builder.select(row_ends, ll.ADDRESS(0), further), self._done)

    def leave(self) -> None:
        """Where the walk is, back to memory."""
        builder = self._builder
        for word, place in enumerate((self._at, self._done)):
            ll.store(builder, builder.load(place), self._address, 8 * word)


@intrinsic  # type: ignore[untyped-decorator]
def take_step(typing_context: Any, walk: Any) -> Any:
    """One step of the walk at an address."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        taken = Walk(builder, args[0])
        taken.step()
        taken.leave()
        return context.get_dummy_value()

    return types.void(types.intp), codegen
