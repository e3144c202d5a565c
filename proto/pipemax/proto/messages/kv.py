"""Stages and the KV daemon (socket `kv`).

On the CPU a message says that something *is done*. On CUDA, `computed` and `loaded` say that it is
*queued*: they carry the number of an event that both processes know, and the receiver makes its own
stream wait for it, so that no CPU waits for a GPU.
"""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from pipemax.proto.memory import MemfdHandle
from pipemax.proto.messages.types import (
    I32,
    Count,
    Epoch,
    Message,
    Seconds,
    ShortText,
    StageIndex,
    StepId,
)

IpcHandle = Annotated[bytes, Meta(min_length=64, max_length=64)]
"""CUDA's, of memory or of an event."""
Events = Annotated[tuple[IpcHandle, ...], Meta(max_length=256)]
"""A ring of interprocess events: number n is recorded on the event at n modulo its length. A number
that has fallen out of the ring was passed long ago: the ring is many times longer than what one
process has queued."""
Direction = Literal["load", "store"]
"""`load` is host to device, `store` device to host. The two never wait for each other."""


class CudaPool(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A device pool on a GPU."""

    memory: IpcHandle
    pid: Count
    """Of the stage: a copy that ended after its stage died may have waited for nothing."""
    pci_bus_id: ShortText
    """Of the GPU: ordinals may differ between processes."""
    computed: Events
    """Recorded by the stage behind each step; numbered by Computed.event."""


class AttachPool(Message, frozen=True, kw_only=True, tag="attach_pool"):
    """A stage offers its device pool. Sent on every Reset."""

    epoch: Epoch
    stage: StageIndex
    incarnation: ShortText = ""
    """As in Hello: copies that another incarnation of the stage had under way are over."""
    handle: MemfdHandle | None = None
    """The pool in shared memory. None with `cuda`, or when the stage makes its copies itself."""
    cuda: CudaPool | None = None
    num_blocks: Count
    block_bytes: Count


class HostRegion(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One stage's part of the host pool: `[num_blocks, block_bytes]` at `offset_bytes`."""

    handle: MemfdHandle
    offset_bytes: Count
    num_blocks: Count
    block_bytes: Count


class AskHostRegion(Message, frozen=True, kw_only=True, tag="ask_host_region"):
    """A stage on a GPU starts: its predecessor is gone, the daemon lets go of what it maps of it.
    A stage that makes its copies itself pins its part of the host pool, while it still loads its
    weights. Said again every few seconds until HostRegionHere answers; from a socket of its own."""

    stage: StageIndex
    pci_bus_id: ShortText = ""
    """Of its GPU: the region belongs on the memory node that this GPU is at."""


class HostRegionHere(Message, frozen=True, kw_only=True, tag="host_region_here"):
    """Sent once the region's pages are there and the predecessor's pool is not mapped any more."""

    region: HostRegion | None = None
    """None: the daemon makes the copies, or there is no host pool."""


class PoolAttached(Message, frozen=True, kw_only=True, tag="pool_attached"):
    """The daemon maps the stage's pool and will copy to and from it in this epoch."""

    epoch: Epoch
    loaded: Events = ()
    """Recorded by the daemon behind each copy to the device; numbered by Loaded.copy."""
    region: HostRegion | None = None
    """For a stage that makes its copies itself."""


class Computed(Message, frozen=True, kw_only=True, tag="computed"):
    """The stage has computed `step`: blocks it read may be overwritten, blocks it filled stored."""

    epoch: Epoch
    step: StepId
    event: int = -1
    """Recorded behind the step; -1: the step is over. Counts up over the life of the stage."""


class Loaded(Message, frozen=True, kw_only=True, tag="loaded"):
    """All blocks of the step's Prefetch are in the stage's pool."""

    epoch: Epoch
    step: StepId
    copy: int = -1
    """The last of its copies to the device; -1: all are over."""


class CopyOrder(Message, frozen=True, kw_only=True, tag="copy_order"):
    """To a stage that makes its copies itself: behind the copies ordered before in this direction.
    Answered by CopyEnded."""

    number: Count
    """Counts up by direction over the life of the daemon."""
    direction: Direction
    after: int
    """Number of the `computed` event to wait for; -1: none."""
    runs: I32
    """[runs, 3] host block within the region, device block, length in blocks."""


class CopyEnded(Message, frozen=True, kw_only=True, tag="copy_ended"):
    """This copy and all before it in its direction have ended."""

    number: Count
    direction: Direction
    bytes: Count
    copies: Count
    """Runs copied, and bytes, since the stage's last CopyEnded in this direction."""
    busy_s: Seconds
    """Time with a copy under way since then."""
