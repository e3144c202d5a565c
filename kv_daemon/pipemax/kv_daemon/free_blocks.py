"""The free list of the host pool."""

import heapq
from collections.abc import Iterator

from pipemax.proto.errors import InvariantError


class FreeBlocks:
    """Free host blocks, kept as extents of neighbours.

    A request's blocks arrive a few at a time, between those of many others, and come back
    together. So a new run starts in the middle of the largest free extent, which leaves its left
    neighbour room to grow, and `take_at` lets a run grow into the block right behind it. Runs
    then merge into one copy without any size being set aside in advance. Every operation costs
    O(log extents).
    """

    def __init__(self, num_blocks: int) -> None:
        self.total = num_blocks
        self.num_free = 0
        self._end_of: dict[int, int] = {}
        self._start_of: dict[int, int] = {}
        self._largest: list[tuple[int, int]] = []  # heap of (-length, start), may hold stale ones
        if num_blocks:
            self._add(0, num_blocks)

    def take_at(self, block: int) -> bool:
        """Takes `block` if it is free and the first of its extent; says whether it was."""
        end = self._end_of.get(block)
        if end is None:
            return False
        self._remove(block, end)
        self._add(block + 1, end)
        return True

    def take_new_run(self, wanted: int) -> int:
        """Takes one block, chosen so that `wanted` blocks and more fit behind it if possible.
        There must be a free one."""
        start, end = self._pop_largest()
        length = end - start
        # At the left edge of the pool nobody needs room to grow.
        spare = max(length - wanted, 0) if start else 0
        block = start + spare // 2
        self._add(start, block)
        self._add(block + 1, end)
        return block

    def give_back(self, block: int) -> None:
        start = self._start_of.get(block, block)
        end = self._end_of.get(block + 1, block + 1)
        if start < block:
            self._remove(start, block)
        if end > block + 1:
            self._remove(block + 1, end)
        self._add(start, end)

    def extents(self) -> Iterator[tuple[int, int]]:
        """All free extents as [start, end), in no order."""
        return iter(self._end_of.items())

    def check_invariants(self) -> None:
        extents = sorted(self.extents())
        before = -1
        for start, end in extents:
            if not before < start < end <= self.total:
                raise InvariantError(f"free extents overlap, touch or leave the pool: {extents}")
            before = end
        if sum(end - start for start, end in extents) != self.num_free:
            raise InvariantError(f"{self.num_free} blocks counted free, listed {extents}")
        if {end: start for start, end in extents} != self._start_of:
            raise InvariantError("the two indexes of free extents differ")

    def _add(self, start: int, end: int) -> None:
        if start == end:
            return
        self._end_of[start] = end
        self._start_of[end] = start
        self.num_free += end - start
        heapq.heappush(self._largest, (start - end, start))
        if len(self._largest) > 4 * len(self._end_of) + 64:
            self._largest = [(start - end, start) for start, end in self._end_of.items()]
            heapq.heapify(self._largest)

    def _remove(self, start: int, end: int) -> None:
        del self._end_of[start]
        del self._start_of[end]
        self.num_free -= end - start

    def _pop_largest(self) -> tuple[int, int]:
        while True:
            negative_length, start = heapq.heappop(self._largest)
            end = start - negative_length
            if self._end_of.get(start) == end:
                self._remove(start, end)
                return start, end
