"""What offloading is worth now: how much KV beyond the device pool makes the pipeline faster.

The link brings X blocks in a step time. Two buffers of X are set aside on the device, so of a pool
of K blocks and N slots a slot has (K − 2X)/N resident and X prefetched blocks, K/N without
offloading. What that many requests more per step gain depends on how step time grows with them:
where the weights bound it, nearly in proportion; above the compute knee, nothing. With prompts
still to come, every decoding request brings its share of prompt tokens into the steps, and the knee
is reached much earlier.
"""

from dataclasses import dataclass

from pipemax.coordinator.cost_model import PipelineCost, StageCost, StepFeatures

LEAST_GAIN = 1.02
"""A smaller gain is not worth the copies."""
ROUNDS_OF_LINK = 1.25
"""KV kept beyond the device pool, in what the link carries in one round: somebody must always be
there to prefetch, but whoever waits for more than a round only takes memory."""
_FIRST_SHARE = 0.25
"""Of the device pool, before the link was measured: enough to measure it."""

_ITERATIONS = 4


@dataclass(frozen=True, slots=True)
class OffloadOutlook:
    """The pipeline while requests wait for admission."""

    device_blocks: int
    num_slots: int
    block_size: int
    request_blocks: float
    """Mean blocks of a running request."""
    prefill_per_output: float
    """Prompt tokens that steps which decode compute for each output token, in the long run."""
    blocks_per_s: float | None
    """What the slowest link carries; None until it was measured."""
    costs: PipelineCost


def worth_offloading(outlook: OffloadOutlook) -> int:
    """Blocks worth holding beyond the device pool; 0 where they would gain nothing."""
    if outlook.blocks_per_s is None:
        return max(1, int(_FIRST_SHARE * outlook.device_blocks))
    forecast = forecast_gain(outlook, outlook.blocks_per_s)
    if forecast is None:
        return max(1, int(_FIRST_SHARE * outlook.device_blocks))
    gain, carried = forecast
    if gain < LEAST_GAIN:
        return 0
    return int(ROUNDS_OF_LINK * outlook.num_slots * carried) + 1


def forecast_gain(outlook: OffloadOutlook, blocks_per_s: float) -> tuple[float, float] | None:
    """Output tokens per second with offloading over those without, and the blocks that are then
    prefetched per step; None while nothing is known of step times. A longer step carries more and
    what it carries makes it longer: the fixed point is found by iteration."""
    slots, blocks = outlook.num_slots, max(1.0, outlook.request_blocks)
    without = outlook.device_blocks / slots / blocks
    stage = outlook.costs.slowest(_features(outlook, without))
    if stage is None:
        return None
    batch, carried = without, 0.0
    for _ in range(_ITERATIONS):
        seconds = stage.predict_anywhere(_features(outlook, batch)) or 0.0
        carried = min(blocks_per_s * seconds, outlook.device_blocks / 2)
        batch = without + max(0.0, carried * (1 - 2 / slots)) / blocks
    return _rate(outlook, stage, batch) / _rate(outlook, stage, without), carried


def _rate(outlook: OffloadOutlook, stage: StageCost, batch: float) -> float:
    seconds = stage.predict_anywhere(_features(outlook, batch))
    return batch / seconds if seconds else 1.0


def _features(outlook: OffloadOutlook, batch: float) -> StepFeatures:
    context = batch * outlook.request_blocks * outlook.block_size
    prompts = batch * outlook.prefill_per_output
    return StepFeatures(max(1, round(batch)), round(context), round(prompts))
