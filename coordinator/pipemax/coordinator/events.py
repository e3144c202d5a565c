"""What the scheduling core is told, and what it answers with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pipemax.proto.messages.control import Drop, Prefetch, Release, StepPlan, Store, SweepSample
from pipemax.proto.messages.ingest import FinishReason, SamplingParams


@dataclass(frozen=True, slots=True)
class Submitted:
    """A request that passed all checks: it fits the model and its `max_tokens` is a number. Its `n`
    choices run as requests of their own, by the keys from `key` on."""

    key: int
    prompt_token_ids: Sequence[int]
    sampling: SamplingParams
    seed: int
    """Unsigned 64 bit; the request's own, or derived from the system's."""
    job: int = 0
    """Requests of one job have outputs of similar length: lengths are forecast by job."""
    bad_words: tuple[tuple[int, ...], ...] = ()
    """The sampling parameters' bad words as token ids."""
    grammar: str = ""
    """Their structured outputs. See SampleRules."""


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The client no longer wants this request. Unknown keys are ignored: it may have finished."""

    key: int
    choices: int = 1
    """As many as it had."""


@dataclass(frozen=True, slots=True)
class Resumed:
    """Every process is ready for `epoch`. What was in flight before is void."""

    epoch: int
    num_device_blocks: int
    num_host_blocks: int
    block_bytes: Sequence[int]
    """By stage."""
    device_kept: bool
    """The device pools still hold what the steps that came back had written."""
    host_kept: bool
    """The host pool still holds what was reported stored."""
    sweeps: Sequence[Sequence[SweepSample]] = ()
    """By stage, what its warm-up sweep measured. Counts only where no step has taught better."""


@dataclass(frozen=True, slots=True)
class Paused:
    """A process was lost. Nothing is planned until Resumed."""


@dataclass(frozen=True, slots=True)
class StageComputed:
    """Any stage reports a step; feeds the cost model."""

    stage: int
    step: int
    compute_s: float
    wait_kv_s: float = 0.0
    """How long the stage waited for the step's prefetch, with nothing else to do."""


@dataclass(frozen=True, slots=True)
class StepReturned:
    """The last stage has computed a step: every stage has."""

    step: int
    tokens: Sequence[int]
    """One per sampled item, in the plan's order; NO_TOKEN fails its request."""
    stopped: Mapping[int, str] = field(default_factory=dict)
    """Stop strings found by detokenising, by request key."""


@dataclass(frozen=True, slots=True)
class BlocksStored:
    kv_keys: Sequence[int]
    indices: Sequence[int]


@dataclass(frozen=True, slots=True)
class KvReleased:
    kv_keys: Sequence[int]


@dataclass(frozen=True, slots=True)
class LinkMeasured:
    """The host-to-device link of each stage, since the last such event."""

    load_bytes: Sequence[int]
    load_seconds: Sequence[float]


Event = (
    Submitted
    | Cancelled
    | Resumed
    | Paused
    | StageComputed
    | StepReturned
    | BlocksStored
    | KvReleased
    | LinkMeasured
)


@dataclass(frozen=True, slots=True)
class ToStages:
    """Send to every stage."""

    message: StepPlan


@dataclass(frozen=True, slots=True)
class ToDaemon:
    message: Prefetch | Store | Release | Drop


@dataclass(frozen=True, slots=True)
class FinishRequest:
    """Deliver the result; the core has forgotten the request."""

    key: int
    output_token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stop_reason: int | str | None
    admitted_at: float | None
    first_token_at: float | None


Command = ToStages | ToDaemon | FinishRequest
