"""How many prompt tokens go into a step.

Slots take turns, so a round is as long as `slots · max T_j`: one long step delays the whole
pipeline, and what the others were shorter is a bubble on every stage. Prompts arrive in lumps, when
somebody finishes and makes room. So they are computed at the rate at which, by the forecast, they
will go on arriving, a stock of admitted prompts takes up the lumps, and a slot that decodes less
than its share takes more of them.
"""

import math
from dataclasses import dataclass

from pipemax.coordinator.cost_model import PipelineCost, StepFeatures

MOST_ROUNDS = 32
"""Rounds in which the stock is worked off, at most. More are more even, but prompts hold their
blocks while they wait."""
_ROUNDS_PER_ARRIVAL = 64
"""The same, for each request that arrives in a round: there must be several to average over. Where
few arrive, waiting would only keep them from decoding."""
_OF_RATE = 0.75
"""Share of the forecast rate that is computed whatever the stock: the rest comes from the stock,
which so settles at a quarter of what arrives in those rounds."""
MIN_CHUNK_TOKENS = 16
"""Prompts are not cut finer than this."""
_MOST_OF_SHARE = 3
"""Largest chunk that evening out may ask for, in even shares."""
_PRECISION_TOKENS = 4
_EVEN_ENOUGH = 0.005
"""Share of a step's time by which it may differ from the mean with an even chunk. Where prompts
cost next to nothing, all the prompts there are would not make up for a context one token longer."""


@dataclass(frozen=True, slots=True)
class Arrivals:
    """What is expected to be admitted in the long run, as others finish."""

    per_round: float
    prompt_tokens_per_step: float


NO_ARRIVALS = Arrivals(0.0, 0.0)


class EvenChunk:
    """The same chunk for every step of a round: were it to follow every step, the steps of one
    round would differ."""

    def __init__(self, num_slots: int) -> None:
        self._num_slots = num_slots
        self._tokens = 0
        self._until_step = -1

    def tokens(self, left_tokens: int, arrivals: Arrivals, step: int) -> int:
        """For `step`, when `left_tokens` of admitted prompts are left."""
        if step >= self._until_step or not self._tokens:
            rounds = min(MOST_ROUNDS, max(1.0, _ROUNDS_PER_ARRIVAL * arrivals.per_round))
            stock = left_tokens / (rounds * self._num_slots)
            self._tokens = math.ceil(_OF_RATE * arrivals.prompt_tokens_per_step + stock)
            self._until_step = step + self._num_slots
        return min(left_tokens, max(MIN_CHUNK_TOKENS, self._tokens))


def balanced_chunk(
    costs: PipelineCost, decode: StepFeatures, share: StepFeatures, most_tokens: int
) -> int:
    """Prompt tokens with which a step that decodes `decode` takes as long as the mean step `share`,
    whose `prefill_tokens` are the even chunk. Without a cost model, the even chunk."""
    even = min(share.prefill_tokens, most_tokens)
    stage = costs.slowest(share)
    target_s = stage.predict(share) if stage else None
    if stage is None or target_s is None or not even:
        return even
    pairs_per_token = share.prefill_pairs / share.prefill_tokens

    def time_s(tokens: int) -> float:
        pairs = round(tokens * pairs_per_token)
        with_chunk = StepFeatures(decode.decode_requests, decode.context_tokens, tokens, pairs)
        return stage.predict(with_chunk) or 0.0

    if abs(time_s(even) - target_s) <= _EVEN_ENOUGH * target_s:
        return even
    low, high = 0, min(_MOST_OF_SHARE * share.prefill_tokens, most_tokens)
    while high - low > _PRECISION_TOKENS:
        middle = (low + high) // 2
        if time_s(middle) > target_s:
            high = middle
        else:
            low = middle
    return high
