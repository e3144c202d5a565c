"""One request's state in the scheduling core.

Lengths, in tokens: `computed` ≤ `planned` ≤ `len(tokens)`. `computed` counts tokens whose KV is
written by steps that came back, `planned` those that steps in flight will have written. A request
whose `planned` is one short of its tokens decodes; one that lacks more prefills (or recomputes,
after a preemption or a crash: there is no difference).
"""

from array import array
from collections.abc import Sequence
from enum import IntEnum
from functools import lru_cache
from typing import TYPE_CHECKING

from pipemax.proto.geometry import blocks_for
from pipemax.proto.messages.ingest import SamplingParams

if TYPE_CHECKING:
    from pipemax.coordinator.forecast import Age
    from pipemax.coordinator.prefixes import SharedBlock

NO_BLOCK = -1
NO_STEP = -1
NOT_RESIDENT = -1
"""In the place of a number of context tokens."""

_NO_TABLE, _NO_HOST = array("i"), bytearray()
_NOTHING: list[int] = []


class HostState(IntEnum):
    NONE = 0
    STORING = 1
    STORED = 2


class Request:
    """Owned and changed by the core and its planner only."""

    __slots__ = (
        "admitted_at",
        "age",
        "arrived_at",
        "bad_words",
        "cancelled",
        "computed",
        "draw",
        "end_tokens",
        "ends_at",
        "evicting",
        "first_token_at",
        "grammar",
        "has_rules",
        "host",
        "in_flight",
        "job",
        "key",
        "kv_key",
        "last_step",
        "last_turn",
        "load_step",
        "loading",
        "max_tokens",
        "needs_row",
        "next_store",
        "num_missing",
        "num_prompt",
        "num_scored",
        "placed_context",
        "placed_prefill",
        "planned",
        "prompt_counted",
        "quiet_until",
        "rules_epoch",
        "sampling",
        "seed",
        "shared",
        "staged_for",
        "table",
        "tokens",
    )

    def __init__(
        self,
        key: int,
        prompt: Sequence[int],
        sampling: SamplingParams,
        seed: int,
        now: float,
        job: int = 0,
        bad_words: tuple[tuple[int, ...], ...] = (),
        grammar: str = "",
    ) -> None:
        assert sampling.max_tokens is not None
        self.key = key
        self.tokens = array("i", prompt)
        """Flat: the garbage collector walks through lists, of thousands of requests each time."""
        self.num_prompt = len(prompt)
        self.sampling = sampling
        self.max_tokens = sampling.max_tokens
        self.draw = _draw_of(
            sampling.temperature, max(0, sampling.top_k), sampling.top_p, sampling.min_p
        )
        """Temperature, top_k, top_p and min_p as its sample rows say them."""
        self.ends_at = self.num_prompt + self.max_tokens
        """Length, prompt included, with which it ends at the latest."""
        self.end_tokens: frozenset[int] = frozenset(sampling.stop_token_ids)
        """Tokens that end it once it has its `min_tokens`."""
        self.seed = seed
        self.job = job
        self.bad_words = bad_words
        """Token ids."""
        self.grammar = grammar
        self.num_scored = len(prompt) if sampling.prompt_logprobs is None else 1
        """Prompt tokens whose logprobs are known or not wanted; the first has none."""
        self.has_rules = _has_rules(sampling)
        """Its tokens are picked by SampleRules."""
        self.needs_row = self.has_rules or sampling.logprobs is not None or sampling.min_tokens > 0
        """Its sample rows say more than how to draw."""
        self.rules_epoch = -1
        """Epoch in which the last stage was last told the request's SampleRules."""
        self.arrived_at = now
        self.admitted_at: float | None = None
        self.first_token_at: float | None = None
        self.cancelled = False
        self.prompt_counted = 0
        """Prompt tokens that steps have computed for it, or for another whose blocks it shares."""
        self.last_turn = NO_STEP
        """Last step that moved the request forward; orders who waited longest."""
        self.age: Age | None = None
        """Where the forecast counts it while it runs."""
        self.quiet_until = 0
        """Length, prompt included, up to which nobody need look at it when it gets a token that
        does not end it: it neither ends nor counts as older before."""
        self.placed_context = NOT_RESIDENT
        self.placed_prefill = 0
        """What the rosters have counted for it: tokens of its context, and left of its prompt."""
        self.shared: list[SharedBlock] = []
        """The first blocks of its table belong to whoever has such a prompt. What `table` and
        `host` say of them is kept up to date with them."""
        self.forget_kv(kv_key=0)
        # Until it is admitted it has none to change, and a hundred thousand may wait.
        self.table, self.host, self.loading = _NO_TABLE, _NO_HOST, _NOTHING

    def forget_kv(self, kv_key: int) -> None:
        """Start over with no KV at all. `kv_key` names the new KV to the daemon: a fresh one at
        every start, so that what is still being released cannot be mistaken for it."""
        self.kv_key = kv_key
        self.computed = 0
        self.planned = 0
        self.in_flight = 0
        self.last_step = NO_STEP
        """Last step, planned or being prefetched for, that touches the device blocks."""
        self.table = array("i")
        """Device block by index; NO_BLOCK where only the host holds it."""
        self.host = bytearray()
        """HostState by index. Flat, like the table."""
        self.num_missing = 0
        self.next_store = 0
        """First index not yet ordered to be stored."""
        self.staged_for = NO_STEP
        """Step a prefetch was ordered for and that has not been planned yet."""
        self.load_step = NO_STEP
        self.loading = []
        """Indices last prefetched, for step `load_step`; on the device for sure once that step has
        come back."""
        self.evicting = False
        """Blocks leave the device as soon as they are stored."""

    @property
    def num_outputs(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def output_token_ids(self) -> tuple[int, ...]:
        return tuple(self.tokens[self.num_prompt :])

    @property
    def remaining(self) -> int:
        """Tokens to compute before the next one can be sampled, not counting steps in flight."""
        return len(self.tokens) - self.planned

    @property
    def is_decode(self) -> bool:
        return self.remaining == 1 and self.num_outputs > 0

    @property
    def is_device_complete(self) -> bool:
        return self.num_missing == 0

    def limit_to(self, max_model_len: int, eos_token_ids: frozenset[int]) -> None:
        """What the model adds to the ends that the request itself has."""
        self.ends_at = min(self.ends_at, max_model_len)
        if not self.sampling.ignore_eos:
            # Most requests have no others: all those share one set.
            self.end_tokens = self.end_tokens | eos_token_ids if self.end_tokens else eos_token_ids

    def blocks_short(self, num_tokens: int, block_size: int) -> int:
        """Blocks to allocate before `num_tokens` more tokens can be computed."""
        return max(0, blocks_for(self.planned + num_tokens, block_size) - len(self.table))

    def rows_to_score(self, num_tokens: int) -> int:
        """Of the next `num_tokens`, those whose logits give logprobs of a prompt token."""
        end = min(self.planned + num_tokens, self.num_prompt - 1)
        return max(0, end + 1 - max(self.planned + 1, self.num_scored))

    def stored_prefix(self) -> int:
        """Blocks from the first on that the host holds."""
        count = 0
        for state in self.host:
            if state != HostState.STORED:
                break
            count += 1
        return count


@lru_cache(1024)
def _draw_of(
    temperature: float, top_k: int, top_p: float, min_p: float
) -> tuple[float, int, float, float]:
    """One tuple for all requests that ask for the same: a hundred thousand may wait."""
    return temperature, top_k, top_p, min_p


def _has_rules(sampling: SamplingParams) -> bool:
    return bool(
        sampling.presence_penalty
        or sampling.frequency_penalty
        or sampling.repetition_penalty != 1.0
        or sampling.logit_bias
        or sampling.allowed_token_ids
        or sampling.bad_words
        or sampling.structured_outputs
    )
