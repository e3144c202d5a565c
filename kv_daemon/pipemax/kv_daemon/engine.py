"""What carries out the core's copies. The CPU's is `cpu_engine.py`."""

from typing import Protocol

from pipemax.kv_daemon.events import Direction, Run
from pipemax.kv_daemon.host_pool import Blocks
from pipemax.proto.messages.control import LinkTotals
from pipemax.proto.messages.kv import AttachPool


class CopyEngine(Protocol):
    """Copies between the host pool and the stages' device pools, beside the caller.

    Used from one thread. Copies of one stage in one direction are carried out in the order in which
    they were started; all others are independent of each other.
    """

    def fileno(self) -> int:
        """A file descriptor that is readable while completions wait."""
        ...

    def map_pool(self, offer: AttachPool) -> None:
        """Maps a stage's device pool in place of the one it had. Copies under way keep the old
        one until they end. Raises PipemaxSystemError when the pool is gone or is not as offered.
        """
        ...

    def held_bytes(self, block_bytes: tuple[int, ...]) -> tuple[int, ...]:
        """What a block of each stage takes in this machine's memory, given what it takes on the
        link."""
        ...

    def lay_out(self, regions: tuple[Blocks, ...]) -> None:
        """The stages' regions of the host pool. Called once, before the first `start`."""
        ...

    def start(self, stage: int, direction: Direction, runs: tuple[Run, ...]) -> None:
        """Takes a copy of these runs on; returns at once."""
        ...

    def completed(self) -> list[tuple[int, Direction]]:
        """Copies that ended since the last call. Raises what went wrong in one, if it did."""
        ...

    def totals(self) -> tuple[LinkTotals, ...]:
        """By stage, since the start."""
        ...

    def close(self) -> None:
        """Lets copies under way end, then unmaps everything."""
        ...
