"""The table of sockets: who binds, who may say what, and how large a message may be.

This table is the protocol. `wire.py` builds its decoders from it, the conformance test walks it,
and `proto/README.md` is generated from it.
"""

import sys
from dataclasses import dataclass, replace

from pipemax.proto.messages import activations, control, ingest, kv, logits, spans
from pipemax.proto.messages.types import Message


@dataclass(frozen=True, slots=True)
class Channel:
    """One socket. Every message but an activation's rows is a single frame."""

    name: str
    binder: str
    """Process that binds."""
    peers: str
    """Processes that connect."""
    max_message_bytes: int
    """Larger messages are refused by the socket itself and close the connection."""
    to_binder: tuple[type[Message], ...]
    to_peer: tuple[type[Message], ...]
    binder_queue_messages: int = 10_000
    """Messages of one peer that wait at the binder; further ones wait in the peer's own socket."""
    max_objects_to_binder: int = sys.maxsize
    """Lists, maps and texts in one message: the binder's memory is many times its size."""


INGEST = Channel(
    name="ingest",
    binder="coordinator",
    peers="clients",
    max_message_bytes=16 * 2**20,
    to_binder=(
        ingest.ClientHello,
        ingest.Submit,
        ingest.Cancel,
        ingest.PartialTaken,
        ingest.StatusQuery,
        ingest.OpenJob,
        ingest.AddRequests,
        ingest.CloseJob,
        ingest.ListJobs,
        ingest.FetchResults,
        ingest.CancelJob,
        ingest.DeleteJob,
        ingest.RetryJob,
        spans.WatchSpans,
    ),
    to_peer=(
        ingest.ServerHello,
        ingest.Finished,
        ingest.Partial,
        ingest.Refused,
        ingest.Status,
        ingest.JobList,
        ingest.JobResults,
        ingest.JobRefused,
        spans.WatchedSpans,
    ),
    binder_queue_messages=32,  # messages can be large and clients are not ours
    max_objects_to_binder=2**19,
)
CONTROL = Channel(
    name="control",
    binder="coordinator",
    peers="stage workers, sampler workers, KV daemon, launcher",
    max_message_bytes=64 * 2**20,
    to_binder=(
        control.Hello,
        control.StageReady,
        control.KvReady,
        control.SamplerReady,
        control.ResetDone,
        control.StepDone,
        control.RowsSampled,
        control.Beat,
        control.Failure,
        control.Stored,
        control.Released,
        control.KvReport,
        control.Drain,
        spans.StageSpans,
        spans.CopySpans,
    ),
    to_peer=(
        control.Welcome,
        control.Reset,
        control.StepPlan,
        control.Prefetch,
        control.Store,
        control.Drop,
        control.Release,
        control.Drained,
        control.SystemReady,
        control.Unresponsive,
        control.Stop,
        spans.RecordSpans,
    ),
)
REPORTS = replace(CONTROL, name="reports", peers="stage workers but the last")
"""The way of `control` to the coordinator a second time, for what need not wake it: of all stages
but the last, StepDone and what is said with every beat. It is read whenever something else wakes
the coordinator, before that, and all the time while no step is under way. With eight stages seven
of eight StepDone bring no tokens, and to be woken for each costs more than to plan a step."""
KV = Channel(
    name="kv",
    binder="KV daemon",
    peers="stage workers",
    max_message_bytes=256 * 2**10,  # a copy order names its runs
    to_binder=(kv.AttachPool, kv.Computed, kv.AskHostRegion, kv.CopyEnded),
    to_peer=(kv.PoolAttached, kv.Loaded, kv.HostRegionHere, kv.CopyOrder),
)
ACTIVATIONS = Channel(
    name="act",
    binder="stage worker s + 1",
    peers="stage worker s",
    max_message_bytes=1024 * 2**20,
    to_binder=(activations.RingOffer, activations.ActivationReady),
    to_peer=(activations.RingAccepted,),
)
LOGITS = Channel(
    name="logits",
    binder="sampler worker i",
    peers="last stage worker",
    max_message_bytes=64 * 2**20,  # sample rows travel in plans, which are not larger
    to_binder=(logits.LogitsOffer, logits.LogitsReady),
    to_peer=(logits.LogitsAccepted,),
)
CHANNELS = (INGEST, CONTROL, KV, ACTIVATIONS, LOGITS)

REGISTRY: dict[str, type[Message]] = {
    str(message.__struct_config__.tag): message
    for channel in CHANNELS
    for message in (*channel.to_binder, *channel.to_peer)
}
"""Every message by its tag. Tags are unique across channels."""
