"""Stages and the KV daemon (socket `kv`)."""

from pipemax.proto.memory import MemfdHandle
from pipemax.proto.messages.types import Count, Epoch, Message, StageIndex, StepId


class AttachPool(Message, frozen=True, kw_only=True, tag="attach_pool"):
    """A stage offers its device pool. Sent on every Reset."""

    epoch: Epoch
    stage: StageIndex
    handle: MemfdHandle
    num_blocks: Count
    block_bytes: Count


class PoolAttached(Message, frozen=True, kw_only=True, tag="pool_attached"):
    """The daemon maps the stage's pool and will copy to and from it in this epoch."""

    epoch: Epoch


class Computed(Message, frozen=True, kw_only=True, tag="computed"):
    """The stage has computed `step`: blocks it read may be overwritten, blocks it filled stored."""

    epoch: Epoch
    step: StepId


class Loaded(Message, frozen=True, kw_only=True, tag="loaded"):
    """All blocks of the step's Prefetch are in the stage's pool."""

    epoch: Epoch
    step: StepId
