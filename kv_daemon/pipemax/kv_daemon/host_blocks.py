"""Which host block holds which KV block, and when a host block is free again.

A host block id means the same on every stage: block i lies at index i of each stage's region of
the host pool, as device block ids do in the device pools.
"""

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain

from pipemax.kv_daemon.free_blocks import FreeBlocks

UNPLACED = -1
"""Host id of a block that waits for a host block to become free."""
_NO_BLOCKS: Mapping[int, "HostBlock"] = {}


class HostBlock:
    """One KV block of one request, on all stages."""

    __slots__ = ("copies", "dropped", "host_id", "index", "request", "to_store")

    def __init__(self, request: int, index: int, to_store: int) -> None:
        self.request = request
        self.index = index
        self.host_id = UNPLACED
        self.to_store = to_store
        """Bit s is set until stage s's part is in host memory; 0 is stored."""
        self.dropped = False
        """Forgotten by the coordinator: no copy of it may start any more."""
        self.copies = 0
        """Copies that were under way when it was dropped and still run. Until they end its host
        block is not free: it is draining."""


class HostTable:
    """(request, block index) → host block. Every host block is free, in the table (being stored
    or stored) or draining."""

    def __init__(self, num_blocks: int) -> None:
        self.free = FreeBlocks(num_blocks)
        self.storing: dict[HostBlock, None] = {}
        """Blocks of the table not wholly stored, in order of arrival (placed or not)."""
        self.draining: dict[HostBlock, None] = {}
        """Dropped blocks that a copy still touches."""
        self._draining_of: dict[int, int] = {}
        self._requests: dict[int, dict[int, HostBlock]] = {}

    def __iter__(self) -> Iterator[HostBlock]:
        return chain.from_iterable(blocks.values() for blocks in self._requests.values())

    def find(self, request: int, index: int) -> HostBlock | None:
        blocks = self._requests.get(request)
        return None if blocks is None else blocks.get(index)

    def of_request(self, request: int) -> Mapping[int, HostBlock]:
        """Blocks of a request by index."""
        return self._requests.get(request, _NO_BLOCKS)

    def is_draining(self, request: int) -> bool:
        """A copy still touches a dropped block of `request`."""
        return request in self._draining_of

    def add(self, request: int, index: int, to_store: int) -> HostBlock:
        """A new block, not placed yet."""
        block = HostBlock(request, index, to_store)
        self._requests.setdefault(request, {})[index] = block
        self.storing[block] = None
        return block

    def place(self, block: HostBlock, wanted: int) -> None:
        """Gives `block` a free host block, of which there must be one: the one behind its
        predecessor's if possible, else one with room for `wanted` blocks and more."""
        before = self.find(block.request, block.index - 1)
        if before is not None and before.host_id != UNPLACED:
            behind = before.host_id + 1
            if self.free.take_at(behind):
                block.host_id = behind
                return
        block.host_id = self.free.take_new_run(wanted)

    def part_stored(self, block: HostBlock, stage_bit: int) -> bool:
        """One stage's part is in host memory; says whether it was the last."""
        block.to_store &= ~stage_bit
        if block.to_store:
            return False
        del self.storing[block]
        return True

    def blocks_from(self, request: int, first_index: int) -> list[HostBlock]:
        """Blocks `first_index` and up of a request."""
        blocks = self._requests.get(request, {})
        return [block for index, block in blocks.items() if index >= first_index]

    def forget(self, dropped: list[HostBlock], under_copy: Iterable[HostBlock]) -> None:
        """Takes blocks out of the table. Their host blocks are free now, or once every copy that
        touches them has ended; `under_copy` names a block once per copy touching it."""
        for block in dropped:
            block.dropped = True
            self.storing.pop(block, None)
            of_request = self._requests[block.request]
            del of_request[block.index]
            if not of_request:
                del self._requests[block.request]
        just_dropped = set(dropped)
        for block in under_copy:
            if block in just_dropped:
                block.copies += 1
        for block in dropped:
            if block.copies:
                self.draining[block] = None
                self._draining_of[block.request] = self._draining_of.get(block.request, 0) + 1
            elif block.host_id != UNPLACED:
                self.free.give_back(block.host_id)

    def copy_ended(self, block: HostBlock) -> bool:
        """A copy of a dropped block has ended; says whether no copy touches any dropped block of
        its request now."""
        block.copies -= 1
        if block.copies:
            return False
        del self.draining[block]
        self.free.give_back(block.host_id)
        left = self._draining_of[block.request] - 1
        if left:
            self._draining_of[block.request] = left
            return False
        del self._draining_of[block.request]
        return True
