"""The coordinator and the other processes of the system (socket `control`)."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from pipemax.proto.messages.types import (
    F32,
    I32,
    Count,
    Epoch,
    ErrorText,
    MeasuredSeconds,
    Message,
    RequestKey,
    Seconds,
    ShortText,
    StageIndex,
    StepId,
)

Role = Literal["stage", "sampler", "kv_daemon", "launcher"]


class Hello(Message, frozen=True, kw_only=True, tag="hello"):
    """First message of a process. A stage or a sampler says it again with every beat, so that a
    coordinator that was started again learns of it; the same incarnation twice changes nothing."""

    protocol: int
    role: Role
    index: StageIndex = 0
    pid: Count
    incarnation: ShortText
    """Differs at every start of a process, so that a restart is noticed however fast it was."""


class Welcome(Message, frozen=True, kw_only=True, tag="welcome"):
    """Answer to Hello."""

    instance_id: ShortText


class SweepSample(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One step of a stage's warm-up sweep: what it was made of, and how long it took."""

    decode_requests: Count
    """Requests that computed one token."""
    context_tokens: Count
    """Tokens whose KV they read."""
    prefill_tokens: Count
    """Prompt tokens computed."""
    prefill_pairs: Count
    """Over all prompt tokens computed, the tokens each attends to."""
    compute_s: MeasuredSeconds


class StageReady(Message, frozen=True, kw_only=True, tag="stage_ready"):
    """The stage has its weights and its pool and waits for a Reset."""

    stage: StageIndex
    layers: tuple[int, int]
    """[first, last + 1) of the model's layers."""
    num_blocks: Count
    block_bytes: Count
    weights_bytes: Count
    load_s: Seconds
    activation_transport: ShortText
    sweep: Annotated[tuple[SweepSample, ...], Meta(max_length=256)] = ()
    """What the stage measured before any work; empty when the warm-up sweep is off."""


class KvReady(Message, frozen=True, kw_only=True, tag="kv_ready"):
    """The daemon has its pool and waits for a Reset."""

    pool_bytes: Count
    context_bytes: tuple[int, ...] = ()
    """By stage: memory of its GPU that the daemon's own CUDA context takes; stages on one GPU share
    one. Empty where the daemon uses no GPU."""


class SamplerReady(Message, frozen=True, kw_only=True, tag="sampler_ready"):
    """The sampler worker is loaded and waits for a Reset."""

    sampler: Count


class Reset(Message, frozen=True, kw_only=True, tag="reset"):
    """Void everything planned so far and get ready for `epoch`.

    Stages forget plans and activations, attach their pool to the daemon (again) and connect to
    their neighbours; the last one also to the samplers, which forget all SampleRules. The daemon
    forgets queued transfers; what the host pool holds stays, unless `keep_host_blocks` is false.
    """

    epoch: Epoch
    keep_host_blocks: bool = True


class ResetDone(Message, frozen=True, kw_only=True, tag="reset_done"):
    """A stage, a sampler or the daemon is ready for `epoch`.

    What earlier epochs left under way on a device has ended: the daemon says it after the last
    void copy, a stage after the last step that it had queued. So nothing of this epoch can meet an
    old kernel or an old copy in a block. A sampler reads no logits of earlier epochs any more.
    """

    epoch: Epoch
    num_host_blocks: Count = 0
    """From the daemon: blocks the host pool holds, each with every stage's part."""


NO_TOKEN = -1


class SampleRules(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What changes a request's logits, and the tokens that it depends on. Neutral where not given:
    penalties 0, 0 and 1, no ids."""

    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    prompt_token_ids: I32 = b""
    """For the repetition penalty: each of the prompt's tokens once."""
    output_token_ids: I32 = b""
    """All output tokens so far."""
    biased_token_ids: I32 = b""
    biases: tuple[float, ...] = ()
    """Of `biased_token_ids`."""
    allowed_token_ids: I32 = b""
    """Empty: all."""
    bad_words: tuple[I32, ...] = ()
    """Token ids, the last of which may not follow the others."""
    grammar: str = ""
    """As llguidance takes it: what the output must be. Empty: anything."""
    end_token_ids: I32 = b""
    """The model's end-of-sequence tokens, which end what the grammar says."""


class RowExtras(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What only some requests ask of a sample row."""

    request: int = -1
    """Whose SampleRules apply; -1: nobody's."""
    rules: SampleRules | None = None
    """Given with the request's first row of an epoch. Whoever samples the request, the last stage
    or one sampler, keeps them, adds the tokens that it samples, and forgets them when a plan says
    that the request has `ended`."""
    num_logprobs: int = -1
    """Wanted beside the token's own: of so many likeliest tokens. -1: none, nor its own."""
    rows_back: int = 0
    """The row is so many tokens before the item's last."""
    target: int = -1
    """Nothing is sampled: the next token is this one of the prompt, and only its logprobs are
    wanted. -1: sample."""


class SampleRow(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """Sample one token after item `item` of the plan."""

    # gc=False, as of BlockMove: hundreds in every step, and in no cycles.

    item: int
    seed: int
    """Unsigned 64 bit."""
    position: int
    """Output tokens the request has already; (seed, position) determines the draw."""
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    banned_token_ids: tuple[int, ...] = ()
    """Tokens that may not be picked (end-of-sequence before min_tokens)."""
    extras: RowExtras | None = None


class RowLogprobs(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Log probabilities at one sample row: the log-softmax of its logits as the model gives them,
    before temperature, rules and cuts."""

    row: Count
    """Index in the plan's `sample`."""
    rank: Count
    """Of the token: 1 for the likeliest."""
    token_ids: I32
    """The token, then the likeliest ones in order, it among them maybe."""
    logprobs: F32
    """Of `token_ids`."""


class StepPlan(Message, frozen=True, kw_only=True, tag="step_plan"):
    """One pass of one micro-batch through all stages; every stage gets it.

    Items are requests. Item i brings `num_tokens[i]` new tokens whose first position is
    `context_lens[i]`; its KV lives in `block_tables`' i-th run, which covers all its tokens, old
    and new. Decode is an item with one token.
    """

    epoch: Epoch
    step: StepId
    slot: Count
    """Micro-batch slot, also the index into the activation ring: a slot's next step is planned
    only after its last one came back, so the ring needs no other flow control."""
    wait_for_load: bool
    """A Prefetch with this step was sent; wait for Loaded before computing."""
    num_tokens: I32
    """[items]"""
    context_lens: I32
    """[items] tokens already in the KV cache."""
    block_counts: I32
    """[items] length of each run in `block_tables`."""
    block_tables: I32
    """[sum(block_counts)] device block ids, item after item."""
    token_ids: I32
    """[sum(num_tokens)]"""
    sample: tuple[SampleRow, ...]
    """For the last stage; empty in what the others get."""
    ended: tuple[RequestKey, ...] = ()
    """Requests whose SampleRules nobody need keep."""


class StepDone(Message, frozen=True, kw_only=True, tag="step_done"):
    """A stage computed a step. The last stage adds the sampled tokens."""

    epoch: Epoch
    step: StepId
    stage: StageIndex
    compute_s: Seconds
    """This step's compute time."""
    state_seconds: dict[str, float]
    """Seconds by state since the stage started; they sum to its wall time. Cumulative, so that a
    lost message loses nothing."""
    tokens: I32 | None = None
    """[len(plan.sample)] in the order of the plan's sample rows; a row's target where it has
    one. NO_TOKEN where a grammar turned out too complex to be followed: the request fails."""
    logprobs: tuple[RowLogprobs, ...] = ()
    """Of the rows that ask for them, in order."""
    elsewhere: I32 = b""
    """Sample rows whose logits went to samplers, which send their tokens and logprobs (see
    RowsSampled); in `tokens` they have NO_TOKEN. The step is over when all are there."""


class RowsSampled(Message, frozen=True, kw_only=True, tag="rows_sampled"):
    """From a sampler: its share of a step's tokens. May come before the last stage's StepDone."""

    epoch: Epoch
    step: StepId
    rows: I32
    """Indices in the plan's `sample`."""
    tokens: I32
    """Of `rows`; as in StepDone."""
    logprobs: tuple[RowLogprobs, ...] = ()
    """Of those of `rows` that ask for them."""


class Beat(Message, frozen=True, kw_only=True, tag="beat"):
    """Sent from a stage's, a sampler's or the daemon's work loop while it waits, at least once a
    second."""

    state_seconds: dict[str, float] = msgspec.field(default_factory=dict)
    """As in StepDone, from a sampler by states of its own; empty from the daemon."""


class Failure(Message, frozen=True, kw_only=True, tag="failure"):
    """A process cannot go on and is about to exit."""

    error: ErrorText


class BlockMove(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """One block between the host pool and every stage's device pool."""

    request: RequestKey
    index: Count
    """Block number within the request."""
    device_block: Count


class Prefetch(Message, frozen=True, kw_only=True, tag="prefetch"):
    """Host to device, in time for `step`. At most one per step.

    On each stage the copies start once the stage has computed `after`, the last step that used
    the target blocks (-1: at once); when all are done, the stage is sent Loaded(step).
    """

    epoch: Epoch
    step: StepId
    after: int
    blocks: tuple[BlockMove, ...]


class Store(Message, frozen=True, kw_only=True, tag="store"):
    """Device to host: blocks that step `after` filled. Each is answered by Stored, once every
    stage's part is in host memory. Storing a block the host already has is answered at once."""

    epoch: Epoch
    after: int
    blocks: tuple[BlockMove, ...]


class Drop(Message, frozen=True, kw_only=True, tag="drop"):
    """Forget host blocks `first_index` and up of a request, copies under way included."""

    epoch: Epoch
    request: RequestKey
    first_index: Count


class Release(Message, frozen=True, kw_only=True, tag="release"):
    """Forget host blocks of these requests. Each is answered by Released once no copy touches any
    block that was forgotten so far; as often as it was asked for."""

    epoch: Epoch
    requests: tuple[RequestKey, ...]
    first_indices: tuple[Count, ...] = ()
    """Pairs with `requests`: of each, blocks from this index on. Empty: all their blocks."""


class Stored(Message, frozen=True, kw_only=True, tag="stored"):
    """These blocks lie in host memory, every stage's part of them."""

    epoch: Epoch
    requests: tuple[RequestKey, ...]
    indices: tuple[Count, ...]
    """Pairs with `requests`."""


class Released(Message, frozen=True, kw_only=True, tag="released"):
    """The host blocks that Release named are free, and no copy touches their device blocks."""

    epoch: Epoch
    requests: tuple[RequestKey, ...]


class LinkTotals(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One stage's link since the daemon started. Seconds count time with a copy under way."""

    load_bytes: int = 0
    load_seconds: float = 0.0
    load_copies: int = 0
    store_bytes: int = 0
    store_seconds: float = 0.0
    store_copies: int = 0


class KvReport(Message, frozen=True, kw_only=True, tag="kv_report"):
    """From the daemon, after work and at least once a second while it works."""

    host_blocks_total: Count
    host_blocks_used: Count
    links: tuple[LinkTotals, ...]
    """By stage."""
    queued_load_bytes: tuple[int, ...]
    """By stage: prefetches not yet copied."""


class Drain(Message, frozen=True, kw_only=True, tag="drain"):
    """From the launcher: accept no more requests, finish what was accepted."""


class Drained(Message, frozen=True, kw_only=True, tag="drained"):
    """To the launcher: nothing is left to do."""


class Unresponsive(Message, frozen=True, kw_only=True, tag="unresponsive"):
    """To the launcher: a process that was ready says nothing any more, not even a Beat. It hangs,
    or was stopped; only its end can be noticed and mended."""

    process: ShortText
    """`stage-1`, `kv-daemon`."""
    silent_s: Seconds


class SystemReady(Message, frozen=True, kw_only=True, tag="system_ready"):
    """To the launcher: the system serves requests (first start or after a recovery)."""

    epoch: Epoch


class Stop(Message, frozen=True, kw_only=True, tag="stop"):
    """Exit now, cleanly."""
