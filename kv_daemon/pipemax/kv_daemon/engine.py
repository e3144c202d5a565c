"""What carries out the core's copies.

`cpu_engine.py` copies between shared memories. For GPUs there are two: `order_engine.py` has every
stage copy for itself, `cuda_engine.py` copies on streams of the daemon.
"""

from dataclasses import dataclass
from typing import Protocol

from pipemax.kv_daemon.events import Direction, PoolMapped, StartCopy
from pipemax.kv_daemon.host_pool import Blocks
from pipemax.proto.config import EngineConfig
from pipemax.proto.errors import ConfigError
from pipemax.proto.messages.control import LinkTotals
from pipemax.proto.messages.kv import AttachPool, CopyEnded, CopyOrder, HostRegion


class CopyEngine(Protocol):
    """Copies between the host pool and the stages' device pools, beside the caller.

    Used from one thread. Copies of one stage in one direction are carried out in the order in which
    they were started; all others are independent of each other.
    """

    orders_computing: bool
    """Of KvCore."""

    def fileno(self) -> int:
        """A file descriptor that is readable while completions wait."""
        ...

    def map_pool(self, offer: AttachPool) -> PoolMapped:
        """Maps a stage's device pool in place of the one it had. Copies under way keep the old
        one until they end. Raises PipemaxSystemError when the pool is gone or is not as offered.
        """
        ...

    def region(self, stage: int) -> HostRegion | None:
        """What a stage that copies for itself has of the host pool; None for the others."""
        ...

    def let_go(self, stage: int) -> bool:
        """The stage starts anew: gives up what is mapped of its predecessor as soon as no copy
        needs it. Says whether that is done; to be called again until it is."""
        ...

    def held_bytes(self, block_bytes: tuple[int, ...]) -> tuple[int, ...]:
        """What a block of each stage takes in this machine's memory, given what it takes on the
        link."""
        ...

    def lay_out(self, regions: tuple[Blocks, ...]) -> None:
        """The stages' regions of the host pool. Called once, before the first `start`. Raises
        ConfigError when they are not those that were laid out before stages were there."""
        ...

    def start(self, copy: StartCopy) -> CopyOrder | None:
        """Takes a copy on; returns at once. What it returns is to be sent to the stage."""
        ...

    def copy_ended(self, stage: int, message: CopyEnded) -> None:
        """A stage says that copies have ended. Raises WireError where stages make none."""
        ...

    def completed(self) -> list[tuple[int, Direction]]:
        """Copies that ended since the last call. Raises what went wrong in one, if it did. To be
        called now and then even if `fileno` is not readable."""
        ...

    def totals(self) -> tuple[LinkTotals, ...]:
        """By stage, since the start."""
        ...

    def close(self) -> None:
        """Lets copies under way end, then unmaps everything."""
        ...


@dataclass(frozen=True, slots=True)
class HostLayout:
    """The host pool, divided before the stages are there."""

    num_blocks: int
    """Of every stage."""
    block_bytes: tuple[int, ...]
    """By stage."""

    @classmethod
    def of(cls, config: EngineConfig) -> "HostLayout":
        assert config.cuda is not None
        block_bytes = config.cuda.block_bytes
        return cls(config.kv_offloading_bytes // sum(block_bytes), block_bytes)

    def part(self, stage: int) -> tuple[int, int]:
        """[begin, end) of the stage's region, in bytes from the beginning of the pool."""
        begin = self.num_blocks * sum(self.block_bytes[:stage])
        return begin, begin + self.num_blocks * self.block_bytes[stage]

    def check(self, regions: tuple[Blocks, ...]) -> None:
        """Raises ConfigError for other regions."""
        found = [region.shape for region in regions]
        if found != [(self.num_blocks, size) for size in self.block_bytes]:
            raise ConfigError(
                f"cuda.block_bytes says {list(self.block_bytes)}, and the stages' KV blocks have "
                f"{[size for _, size in found]} bytes; start the system again with `pipemax up`, "
                "which counts them from the model"
            )
