"""Status, asked for on the socket `ingest`: the system's processes, micro-batches and jobs."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from pipemax.proto.messages.control import LinkTotals
from pipemax.proto.messages.types import Count, JobName, JobState, Message, Seconds


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


class StatusQuery(Message, frozen=True, kw_only=True, tag="status_query"):
    """Asks for a Status."""


class Status(Message, frozen=True, kw_only=True, tag="status"):
    """What the system is doing now."""

    instance_id: str
    phase: Literal["starting", "ready", "recovering", "draining"]
    model_name: str
    uptime_s: Seconds
    requests_waiting: Count
    requests_running: Count
    requests_finished: Count
    preemptions: Count
    prompt_tokens: Count
    prefix_query_tokens: Count = 0
    """Prompt tokens of requests that might share their first blocks with others."""
    prefix_hit_tokens: Count = 0
    """Of those, tokens taken over from another request; they count as `prompt_tokens` too."""
    generation_tokens: Count
    recomputed_tokens: Count
    """Tokens computed again after a preemption or a crash."""
    prefetched_tokens: Count
    """Tokens of context that decode and prefill steps read after a prefetch from the host."""
    context_tokens: Count
    """Tokens of context that all steps read."""
    decode_context_tokens: Count
    """Tokens of context that decode items (one new token on a finished prompt) read."""
    decode_prefetched_tokens: Count
    """Of those, tokens prefetched from the host for that very step."""
    prefetch_budget_blocks: Count = 0
    """Blocks that the prefetches ordered so far could have brought within the link's budget, or all
    there was to bring, if less."""
    prefetch_blocks: Count = 0
    """Blocks they did bring."""
    late_prefetches: Count = 0
    """Times that a stage waited for a step's prefetch, by more than 1 % of the step's time."""
    device_blocks_total: Count
    device_blocks_used: Count
    host_blocks_total: Count
    host_blocks_used: Count
    load_bytes: Count
    """Host to device, all stages."""
    store_bytes: Count
    load_seconds: Seconds
    store_seconds: Seconds
    epoch: Count
    """Resets so far, the first being the start."""
    missing: tuple[str, ...]
    """Processes the system waits for."""
    stages: tuple[StageStatus, ...]
    samplers: tuple[SamplerStatus, ...] = ()
    slots: tuple[SlotStatus, ...] = ()
    jobs: tuple[JobProgress, ...] = ()
    """Unfinished jobs, oldest first; of very many, the first."""
    coordinator_busy_seconds: Seconds = 0.0
    """Time in which the coordinator did not wait for messages."""
