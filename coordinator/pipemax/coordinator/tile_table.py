"""What a number of rows costs beside a straight line: GEMM time climbs in steps of tiles."""

from bisect import bisect_left, insort
from collections.abc import Sequence

TILE_ROWS = 128
"""Rows of a GEMM tile: cost jumps where a further tile begins."""
_KNOT_OFFSETS = (0, 63, TILE_ROWS - 1)
"""Where in a tile the table has values: its first row, its middle and its last."""
_KNOT_GAIN = 0.05
"""Weight of the newest step in a table value seen often; the first visits count more."""
_FACTOR_RANGE = (0.5, 2.0)


class TileTable:
    """c(rows): what the cost of a number of rows is to the straight line, as a factor."""

    def __init__(self) -> None:
        self._factors: dict[int, list[float]] = {}
        self._seen: list[int] = []
        """Tiles that have factors, in order."""
        self._visits: dict[int, list[float]] = {}

    def factor(self, rows: int) -> float:
        """Between tiles that were seen, on the line from the one to the other; beyond them, as the
        nearest; 1 while none was."""
        tile, knot, right = _place(rows)
        factors = self._factors.get(tile)
        if factors is None:
            return self._between(tile)
        return factors[knot] + right * (factors[knot + 1] - factors[knot])

    def _between(self, tile: int) -> float:
        above = bisect_left(self._seen, tile)
        low, high = self._seen[max(0, above - 1) : above], self._seen[above : above + 1]
        if not low or not high:
            return self._factors[low[0]][-1] if low else self._factors[high[0]][0] if high else 1.0
        first, last = self._factors[low[0]][-1], self._factors[high[0]][0]
        return first + (last - first) * (tile - low[0]) / (high[0] - low[0])

    def learn(self, rows: int, observed: float, weight: float) -> None:
        """Moves the two values beside `rows` towards the `observed` factor; `weight`, 0 to 1, is
        how much it says."""
        low, high = _FACTOR_RANGE
        observed = min(high, max(low, observed))
        tile, knot, right = _place(rows)
        if tile not in self._factors:
            insort(self._seen, tile)
            self._factors[tile] = [observed] * len(_KNOT_OFFSETS)
            self._visits[tile] = [0.0] * len(_KNOT_OFFSETS)
        factors, visits = self._factors[tile], self._visits[tile]
        left = 1.0 - right
        error = observed - (factors[knot] + right * (factors[knot + 1] - factors[knot]))
        norm = left * left + right * right
        for index, share in ((knot, left), (knot + 1, right)):
            visits[index] += share
            gain = max(_KNOT_GAIN, 1.0 / (1.0 + visits[index])) * weight
            moved = factors[index] + gain * share / norm * error
            factors[index] = min(high, max(low, moved))
        if 0.0 in visits:
            _fill(factors, visits)


def _fill(factors: list[float], visits: Sequence[float]) -> None:
    """Values that were never visited are as the nearest that was, the one before first."""
    visited = [index for index, visit in enumerate(visits) if visit]
    for index, visit in enumerate(visits):
        if not visit:
            factors[index] = factors[min(visited, key=lambda i: (abs(i - index), i))]


def _place(rows: int) -> tuple[int, int, float]:
    """The tile, the knot left of the row in it, and how far right of that knot it lies, 0 to 1."""
    tile, offset = divmod(rows - 1, TILE_ROWS) if rows > 0 else (0, 0)
    first, middle, last = _KNOT_OFFSETS
    if offset < middle:
        return tile, 0, (offset - first) / (middle - first)
    return tile, 1, (offset - middle) / (last - middle)
