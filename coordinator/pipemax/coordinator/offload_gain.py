"""What offloading is worth now: how much KV beyond the device pool makes the pipeline faster.

The link brings X blocks in a step time. Two buffers of X are set aside on the device, so of a pool
of K blocks and N slots a slot has (K − 2X)/N resident and X prefetched blocks. Without offloading
it has u·K/N: of the pool only the share u is in use, because room must be kept for requests to
grow. What that many requests more per step gain depends on how step time grows with them: where
the weights bound it, nearly in proportion; above the compute knee, nothing. With prompts still to
come, every decoding request brings its share of prompt tokens into the steps, and the knee is
reached much earlier.
"""

from dataclasses import dataclass

from pipemax.coordinator.cost_model import PipelineCost, StageCost, StepFeatures

LEAST_GAIN = 1.05
"""A smaller gain is not worth the copies, nor surer than the cost model is exact."""
_ENOUGH = 0.99
"""Of the best rate: no more is offloaded than it takes to get there."""
_SHARES = (0.125, 0.25, 0.5, 0.75, 1.0)
"""Of what the link could carry, that are looked at for it."""
ROUNDS_OF_LINK = 2.0
"""KV kept beyond the device pool, in what the link carries in one round: the selector needs some to
choose from, but whoever waits for long only takes memory."""
_FIRST_SHARE = 0.25
"""Of the device pool, before the link was measured: enough to measure it."""

_ITERATIONS = 4
"""Rounds towards the fixed point, from the batch that fits without offloading."""


@dataclass(frozen=True, slots=True)
class OffloadOutlook:
    """The pipeline while requests wait for admission."""

    device_blocks: int
    num_slots: int
    block_size: int
    max_num_batched_tokens: int
    request_blocks: float
    """Mean blocks of a running request."""
    share_in_use: float
    """Of the device pool without offloading, 0 to 1."""
    prefill_per_output: float
    """Prompt tokens that steps which decode compute for each output token, in the long run."""
    blocks_per_s: float | None
    """What the slowest link carries; None until it was measured."""
    costs: PipelineCost


def worth_offloading(outlook: OffloadOutlook) -> int | None:
    """Blocks worth holding beyond the device pool. None where offloading would gain nothing, so
    that requests should rather be admitted as if there were no host memory."""
    unknown = max(1, int(_FIRST_SHARE * outlook.device_blocks))
    if outlook.blocks_per_s is None:
        return unknown
    forecast = forecast_gain(outlook, outlook.blocks_per_s)
    if forecast is None:
        return unknown
    gain, carried = forecast
    if gain < LEAST_GAIN:
        return None
    return int(ROUNDS_OF_LINK * outlook.num_slots * carried) + 1


def forecast_gain(outlook: OffloadOutlook, blocks_per_s: float) -> tuple[float, float] | None:
    """Output tokens per second with offloading over those without, and the blocks that it takes to
    prefetch per step for that; None while nothing is known of step times. A longer step carries
    more and what it carries makes it longer: the fixed point is found by iteration."""
    slots, blocks = outlook.num_slots, max(1.0, outlook.request_blocks)
    full = outlook.device_blocks / slots / blocks
    without = full * outlook.share_in_use
    stage = outlook.costs.slowest(_features(outlook, without))
    if stage is None:
        return None
    batch, carried = full, 0.0
    for _ in range(_ITERATIONS):
        carried = min(blocks_per_s * _seconds(outlook, stage, batch), outlook.device_blocks / 2)
        batch = full + max(0.0, carried * (1 - 2 / slots)) / blocks
    best = _rate(outlook, stage, batch)
    for share in _SHARES if slots > 2 else ():
        if _rate(outlook, stage, full + share * (batch - full)) >= _ENOUGH * best:
            return best / _rate(outlook, stage, without), share * carried
    return best / _rate(outlook, stage, without), carried


def _rate(outlook: OffloadOutlook, stage: StageCost, batch: float) -> float:
    batch = _decoding(outlook, batch)
    seconds = _seconds(outlook, stage, batch)
    return batch / seconds if seconds else 1.0


def _decoding(outlook: OffloadOutlook, batch: float) -> float:
    """How many of a batch decode in the mean step. Where a step cannot take the batch's share of
    prompt tokens, prompts are what keeps the pipeline busy, and only so many decode beside them."""
    return min(batch, outlook.max_num_batched_tokens / (1 + outlook.prefill_per_output))


def _seconds(outlook: OffloadOutlook, stage: StageCost, batch: float) -> float:
    """Of the mean step; a batch that is no whole number lies between two."""
    batch = max(1.0, _decoding(outlook, batch))
    low = int(batch)
    first, second = (
        stage.predict_anywhere(_features(outlook, count)) or 0.0 for count in (low, low + 1)
    )
    return first + (batch - low) * (second - first)


def _features(outlook: OffloadOutlook, batch: float) -> StepFeatures:
    context = batch * outlook.request_blocks * outlook.block_size
    return StepFeatures(
        max(1, round(batch)), round(context), round(batch * outlook.prefill_per_output)
    )
