"""Which device blocks are free, and from which step on a copy may overwrite them.

One allocator serves all stages: a block id means the same on each. Blocks return to it while the
steps that read them are still in flight, because reuse is ordered elsewhere: a later step writes
after the earlier one read (stages run steps in order), and the KV daemon starts a prefetch only
`after` the step that last used its target blocks.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from pipemax.proto.errors import InvariantError

NEVER_USED = -1
"""`ready_after` of a block that no step in flight touches."""
_SPAN_BLOCKS = 4096
"""Blocks looked at together for free ones."""


class _LowestFirst:
    """A set of block ids that gives the lowest first: low ids keep allocations dense, and dense
    blocks merge into one copy. A flag per block, as many blocks come and go at once."""

    def __init__(self, num_blocks: int, used: Iterable[int]) -> None:
        self._is_free = np.ones(num_blocks, np.bool_)
        self._is_free[list(used)] = False
        self._count = int(self._is_free.sum())
        self._low = 0
        """No block below is in the set."""

    def __len__(self) -> int:
        return self._count

    def add(self, blocks: Sequence[int]) -> None:
        if not blocks:
            return
        before = int(np.count_nonzero(self._is_free[blocks]))
        if before:
            raise InvariantError(f"{before} device blocks were given back twice")
        self._is_free[blocks] = True
        self._count += len(blocks)
        lowest = min(blocks)
        self._low = min(self._low, lowest)

    def take(self, count: int) -> list[int]:
        """The lowest, of which there must be so many."""
        taken: list[int] = []
        while len(taken) < count:
            span = self._is_free[self._low : self._low + _SPAN_BLOCKS]
            found = np.flatnonzero(span)[: count - len(taken)]
            span[found] = False
            taken += (found + self._low).tolist()
            self._low = taken[-1] + 1 if len(taken) == count > 0 else self._low + _SPAN_BLOCKS
        self._count -= count
        return taken

    def all(self) -> list[int]:
        free: list[int] = np.flatnonzero(self._is_free).tolist()
        return free


class DeviceBlocks:
    def __init__(self, num_blocks: int, used: Iterable[int] = ()) -> None:
        self.num_blocks = num_blocks
        self._settled = NEVER_USED
        self._clean = _LowestFirst(num_blocks, used)
        self._pending: dict[int, list[int]] = {}
        self._num_pending = 0

    @property
    def num_free(self) -> int:
        return len(self._clean) + self._num_pending

    def num_ready(self, latest_step: int) -> int:
        """Free blocks that a copy may overwrite once `latest_step` is computed."""
        pending = sum([len(b) for step, b in self._pending.items() if step <= latest_step])
        return len(self._clean) + pending

    @property
    def settled_step(self) -> int:
        """Newest step known to be computed on every stage."""
        return self._settled

    def release(self, blocks: Iterable[int], ready_after: int) -> None:
        """Give blocks back; `ready_after` is the last planned step that uses them."""
        if ready_after <= self._settled:
            self._clean.add(list(blocks))
            return
        before = self._pending.setdefault(ready_after, [])
        size = len(before)
        before.extend(blocks)
        self._num_pending += len(before) - size

    def settle(self, step: int) -> None:
        """Every stage has computed `step`."""
        self._settled = max(self._settled, step)
        for done in [s for s in self._pending if s <= self._settled]:
            blocks = self._pending.pop(done)
            self._num_pending -= len(blocks)
            self._clean.add(blocks)

    def take_for_write(self, count: int) -> list[int] | None:
        """Blocks that the next planned step fills; None when there are not enough. Takes blocks
        that copies would have to wait for first, and leaves the others to prefetches."""
        if count > self.num_free:
            return None
        taken: list[int] = []
        for step in sorted(self._pending, reverse=True):
            if len(taken) == count:
                break
            taken += self._take_pending(step, count - len(taken))
        return taken + self._clean.take(count - len(taken))

    def take_for_copy(self, count: int, latest_step: int) -> tuple[list[int], int] | None:
        """Blocks for a prefetch and the step it has to wait for, at most `latest_step`; None when
        there are not enough."""
        if count > self.num_ready(latest_step):
            return None
        taken = self._clean.take(min(count, len(self._clean)))
        after = NEVER_USED
        if len(taken) == count:
            return taken, after
        for step in sorted(self._pending):
            if len(taken) == count:
                break
            taken += self._take_pending(step, count - len(taken))
            after = step
        return taken, after

    def free_blocks(self) -> list[int]:
        """All free blocks, for checks."""
        return self._clean.all() + [b for blocks in self._pending.values() for b in blocks]

    def check(self) -> None:
        free = self.free_blocks()
        if len(free) != self.num_free or len(set(free)) != len(free):
            raise InvariantError("a device block is free twice")

    def _take_pending(self, step: int, count: int) -> list[int]:
        blocks = self._pending[step]
        taken = blocks[-count:]
        del blocks[-count:]
        self._num_pending -= len(taken)
        if not blocks:
            del self._pending[step]
        return taken
