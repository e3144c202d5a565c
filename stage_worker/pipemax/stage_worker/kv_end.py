"""A stage's end of its KV traffic: what it offers the daemon, and what the daemon asks of it.

Imports no torch: the shell talks to it, whatever the engine is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from pipemax.proto.errors import WireError
from pipemax.proto.memory import MemfdHandle
from pipemax.proto.messages.kv import CopyEnded, CopyOrder, CudaPool, PoolAttached


@dataclass(frozen=True, slots=True)
class PoolOffer:
    """See AttachPool. Both None: the stage makes its copies itself."""

    handle: MemfdHandle | None = None
    cuda: CudaPool | None = None


class KvEnd(Protocol):
    def offer(self) -> PoolOffer:
        """What the daemon needs to reach this stage's pool."""

    def attach(self, answer: PoolAttached) -> None:
        """Takes what the daemon answered to the offer; returns at once."""

    @property
    def attached(self) -> bool:
        """All that the latest answer asked for is done."""

    def detach(self) -> None:
        """A reset: `attached` is false until the next answer. Copies under way run on."""

    def order(self, order: CopyOrder) -> None:
        """Queues a copy. Raises WireError where the daemon makes the copies."""

    def fileno(self) -> int | None:
        """Readable when `attached` or `ended` may have changed; None if they change by messages
        only."""

    def ended(self) -> Sequence[CopyEnded]:
        """What ended since the last call, to be told to the daemon."""


class MappedPool:
    """KvEnd of a pool in shared memory, which the daemon maps and copies to and from."""

    def __init__(self, handle: MemfdHandle) -> None:
        self._offer = PoolOffer(handle=handle)
        self._attached = False

    def offer(self) -> PoolOffer:
        return self._offer

    def attach(self, answer: PoolAttached) -> None:
        self._attached = True

    @property
    def attached(self) -> bool:
        return self._attached

    def detach(self) -> None:
        self._attached = False

    def order(self, order: CopyOrder) -> None:
        raise WireError("unexpected", "a copy_order for a stage whose pool the daemon maps")

    def fileno(self) -> None:
        return None

    def ended(self) -> Sequence[CopyEnded]:
        return ()
