"""What the core hears and what it answers. Nothing here does anything."""

from dataclasses import dataclass
from typing import NamedTuple

from pipemax.proto.messages.control import (
    Drop,
    Prefetch,
    Release,
    Released,
    Reset,
    ResetDone,
    Store,
    Stored,
)
from pipemax.proto.messages.kv import (
    AttachPool,
    Computed,
    Events,
    HostRegion,
    Loaded,
    PoolAttached,
)
from pipemax.proto.messages.kv import Direction as Direction

DIRECTIONS: tuple[Direction, Direction] = ("load", "store")


class ContradictionError(Exception):
    """The coordinator and the daemon disagree about what the host holds.

    Between processes that trust each other this is a bug in one of them. Answering anyway would
    let a stage compute on wrong KV, and not answering would stall the batch for ever, so the
    daemon leaves with its reason in the log. It is started again, empty, and the coordinator
    recomputes what the host held: slower, and right. Not a PipemaxError, because those mean that
    starting again is useless.
    """


@dataclass(frozen=True, slots=True)
class NewCoordinator:
    """Another coordinator than before: its requests and its epochs are numbered anew."""


@dataclass(frozen=True, slots=True)
class FromStage:
    """A message of stage `stage`."""

    stage: int
    message: AttachPool | Computed


@dataclass(frozen=True, slots=True)
class PoolMapped:
    """The MapPool command for this offer was carried out."""

    offer: AttachPool
    loaded: Events = ()
    """See PoolAttached."""
    region: HostRegion | None = None


@dataclass(frozen=True, slots=True)
class CopyDone:
    """The oldest StartCopy under way on this stage in this direction has ended."""

    stage: int
    direction: Direction


Event = (
    Reset | Prefetch | Store | Drop | Release | NewCoordinator | FromStage | PoolMapped | CopyDone
)


class Run(NamedTuple):
    """`length` neighbouring blocks, in the host region and in the device pool: one copy."""

    host_block: int
    device_block: int
    length: int


@dataclass(frozen=True, slots=True)
class SendToStage:
    stage: int
    message: PoolAttached | Loaded


@dataclass(frozen=True, slots=True)
class SendToCoordinator:
    message: ResetDone | Stored | Released


@dataclass(frozen=True, slots=True)
class MapPool:
    """Map the stage's device pool in place of the one it had; answer with PoolMapped. If that
    fails the stage is gone: no answer, its successor will offer another."""

    offer: AttachPool


@dataclass(frozen=True, slots=True)
class LayOutHost:
    """Divide the host pool into one region `[num_blocks, block_bytes[s]]` per stage s. Comes once,
    before the first StartCopy."""

    num_blocks: int
    block_bytes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StartCopy:
    """Copy these runs, after those started before on this stage in this direction; answer with
    CopyDone in the same order."""

    stage: int
    direction: Direction
    runs: tuple[Run, ...]
    number: int = 0
    """Counts up by stage and direction over the life of the daemon."""
    after: int = -1
    """Number of the stage's `computed` event that the copy must wait for; -1: none. See
    Computed.event."""


Command = SendToStage | SendToCoordinator | MapPool | LayOutHost | StartCopy
