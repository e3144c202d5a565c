"""Parts of Status: the system's processes, micro-batches and jobs."""

from typing import Annotated

import msgspec
from msgspec import Meta

from pipemax.proto.messages.control import LinkTotals
from pipemax.proto.messages.types import Count, JobName, JobState, Seconds


class StageStatus(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One stage's part of Status."""

    stage: int
    pid: int
    layers: tuple[int, int]
    state_seconds: dict[str, float]
    steps: int
    activation_transport: str
    """How its activations reach the next stage."""
    device: str = ""
    """What it computes on, in words."""
    kv_copies: str = ""
    """Whose streams carry its KV; empty where there is no choice."""
    link: LinkTotals = LinkTotals()
    """What its link carried since the coordinator started."""
    queued_load_bytes: Count = 0
    """Prefetches ordered and not yet copied."""
    link_bandwidth_bytes_s: Annotated[float, Meta(ge=0)] = 0.0
    """Host to device, measured under load: what prefetches are planned with. 0 until measured."""


class SlotStatus(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a micro-batch slot's step in flight is made of; zeros between steps."""

    requests: Count = 0
    context_tokens: Count = 0
    """Whose KV its decode items read."""
    prefill_tokens: Count = 0
    """Prompt tokens it computes."""


class JobProgress(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How far a job is; names as in JobInfo."""

    name: JobName
    state: JobState
    num_requests: Count
    num_results: Count
    num_failed: Count
    eta_s: Seconds | None = None
    """Until its last result, if results go on coming as they did of late; None while nothing is
    known, and for what does not run."""


class SamplerStatus(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One sampler worker's part of Status."""

    sampler: int
    pid: int
    rows: int
    """Sampled so far."""
    state_seconds: dict[str, float]
