"""The modelled stage's KV pool: small real blocks that say what they hold, so that every wrong one
is noticed."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipemax.proto.memory import SharedMemory
from pipemax.proto.modelled import KV_TOKEN_BYTES
from pipemax.stage_worker.engine import WrongKvError
from pipemax.stage_worker.modelled.marks import (
    U64Array,
    layers_mark,
    positions_in,
    scramble,
    words,
)
from pipemax.stage_worker.plan_columns import I64Array, PlanColumns


@dataclass(frozen=True, slots=True)
class ContextSlots:
    """Where the tokens that a step reads lie in the pool."""

    slots: I64Array
    """`[C]`: block id · block_size + offset, item after item."""
    positions: I64Array
    """`[C]`: of each token in its request."""
    has_context: npt.NDArray[np.bool_]
    """`[items]`"""
    last: I64Array
    """`[items with context]`: where each one's last token is in `slots`."""

    @classmethod
    def of(cls, columns: PlanColumns, block_size: int) -> "ContextSlots":
        lens = columns.context_lens.astype(np.int64)
        ends = np.cumsum(lens)
        positions = np.arange(ends[-1]) - np.repeat(ends - lens, lens)
        in_table = np.repeat(columns.table_starts, lens) + positions // block_size
        slots = columns.block_tables[in_table].astype(np.int64) * block_size
        slots += positions % block_size
        has_context = lens > 0
        return cls(slots, positions, has_context, ends[has_context] - 1)


@dataclass(frozen=True, slots=True)
class HeldContext:
    """What a step found in its blocks."""

    held: U64Array
    """`[C, 2]`: the slots."""
    hashes: U64Array
    """`[items]`: context hash of each item without the stage's mark; 0 without context."""


class ModelledPool:
    """`[num_blocks, block_size]` slots of KV_TOKEN_BYTES in shared memory, block after block.

    A slot holds two numbers of 64 bit: token and position in one (`marks.words`), and the context
    hash up to and including this token, to which the stage's layers are added.
    """

    def __init__(self, num_blocks: int, block_size: int, layers: tuple[int, int]) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._layers_mark = layers_mark(layers)
        size_bytes = num_blocks * block_size * KV_TOKEN_BYTES
        self.memory = SharedMemory.create("pipemax-modelled-kv", size_bytes)
        self.memory.prefault()
        self._slots = np.frombuffer(self.memory.buffer, np.uint64).reshape(-1, 2)

    def read(self, context: ContextSlots, what: str) -> HeldContext:
        """What the blocks hold for the step that `what` names.

        Raises WrongKvError unless every slot holds the position it must and continues the one
        before it, from the first token of the request on.
        """
        held = np.take(self._slots, context.slots, axis=0)
        found, hashes = held[:, 0], held[:, 1]
        before = np.empty_like(hashes)
        before[1:] = hashes[:-1]
        before[context.positions == 0] = self._layers_mark
        wrong = (hashes - before != scramble(found)) | (positions_in(found) != context.positions)
        if wrong.any():
            raise WrongKvError(f"{what}: {self._describe(context, held, int(wrong.argmax()))}")
        of_items = np.zeros(context.has_context.shape, np.uint64)
        of_items[context.has_context] = hashes[context.last] - self._layers_mark
        return HeldContext(held, of_items)

    def check_unchanged(self, context: ContextSlots, before: HeldContext, what: str) -> None:
        """Raises WrongKvError when somebody wrote to a block while the step that reads it ran."""
        now = np.take(self._slots, context.slots, axis=0)
        if not np.array_equal(now, before.held):
            first = int((now != before.held).any(axis=1).argmax())
            block = int(context.slots[first]) // self.block_size
            raise WrongKvError(f"{what}: device block {block} was overwritten while the step ran")

    def write(self, columns: PlanColumns, hashes: U64Array) -> None:
        """Fills the slots of the step's new tokens; `hashes` `[T]` as `continue_with` gave them."""
        self._slots[columns.slots, 0] = words(columns.token_ids, columns.positions)
        self._slots[columns.slots, 1] = hashes + self._layers_mark

    def close(self) -> None:
        del self._slots
        self.memory.close()

    def _describe(self, context: ContextSlots, held: U64Array, first: int) -> str:
        slot, position = int(context.slots[first]), int(context.positions[first])
        block, offset = divmod(slot, self.block_size)
        found = int(positions_in(held[first : first + 1, 0])[0])
        where = f"device block {block}, token {offset} of {self.block_size}"
        if not held[first].any():
            return f"{where} is empty, the KV of position {position} must be there"
        if found != position:
            return f"{where} holds the KV of position {found}, that of {position} must be there"
        return f"{where} holds position {position} of another context or of other layers"


def continue_with(columns: PlanColumns, before: U64Array) -> U64Array:
    """`[T]`: context hash up to and including each new token, given each item's hash before
    (`[items]`)."""
    sums = np.cumsum(scramble(words(columns.token_ids, columns.positions)), dtype=np.uint64)
    starts = columns.row_starts
    offsets = before - np.where(starts > 0, sums[starts - 1], np.uint64(0))
    return sums + offsets[columns.item_of_row]
