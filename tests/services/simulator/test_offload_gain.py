"""The scheduler's own idea of what offloading gains, against the closed form."""

import pytest

from pipemax.coordinator.cost_model import PipelineCost
from pipemax.coordinator.offload_gain import OffloadOutlook, forecast_gain, worth_offloading
from pipemax.services.simulator.closed_form import decode_forecast
from pipemax.stage_worker.modelled.catalogue import load_catalogue
from pipemax.stage_worker.modelled.loads import modelled_sweep
from pipemax.stage_worker.modelled.roofline import StageModel
from pipemax.stage_worker.sweep import SweepLimits

CATALOGUE = load_catalogue()
SLOTS = 8
BLOCK = 32
CONTEXT = 343.76 + 237.20 / 2
"""Mean context of ShareGPT's lengths."""


def stage_of(gpu: str) -> StageModel:
    shape = CATALOGUE.model("llama-2-70b")
    return StageModel(CATALOGUE.gpu(gpu), shape, shape.num_layers // SLOTS)


def outlook_of(stage: StageModel, prefill_per_output: float = 0.0) -> OffloadOutlook:
    """What the scheduler knows after the warm-up sweeps and the first measured copies."""
    block_bytes = BLOCK * stage.kv_token_bytes
    num_blocks = int(stage.kv_bytes / block_bytes)
    costs = PipelineCost(SLOTS)
    limits = SweepLimits(1024, 2048, 4096, num_blocks, BLOCK)
    costs.warm_up([modelled_sweep(stage, limits)] * SLOTS)
    return OffloadOutlook(
        device_blocks=num_blocks,
        num_slots=SLOTS,
        block_size=BLOCK,
        max_num_batched_tokens=2048,
        share_in_use=1.0,
        request_blocks=CONTEXT / BLOCK,
        prefill_per_output=prefill_per_output,
        blocks_per_s=stage.efficiencies.link * stage.gpu.link_bytes_s / block_bytes,
        costs=costs,
    )


@pytest.mark.parametrize("gpu", ["RTX 3090", "RTX 4090", "A10", "RTX 5090", "L20"])
def test_the_gain_and_what_is_carried_are_about_the_closed_forms(gpu: str) -> None:
    """Decode only. The fitted cost is a straight line where the roofline has a knee."""
    stage = stage_of(gpu)
    without = decode_forecast(stage, SLOTS, CONTEXT, offload=False)
    with_it = decode_forecast(stage, SLOTS, CONTEXT, offload=True)
    outlook = outlook_of(stage)
    assert outlook.blocks_per_s is not None
    found = forecast_gain(outlook, outlook.blocks_per_s)
    assert found is not None
    gain, carried = found
    assert gain == pytest.approx(with_it.tokens_s / without.tokens_s, rel=0.06)
    if gain > 1.05:
        assert BLOCK * carried == pytest.approx(with_it.prefetched_tokens, rel=0.2)
    else:
        assert BLOCK * carried < 0.5 * with_it.prefetched_tokens  # more would gain nothing


def test_what_is_worth_offloading_keeps_the_link_busy_for_a_round() -> None:
    stage = stage_of("RTX 3090")
    with_it = decode_forecast(stage, SLOTS, CONTEXT, offload=True)
    round_blocks = SLOTS * with_it.prefetched_tokens / BLOCK
    worth = worth_offloading(outlook_of(stage))
    assert worth is not None
    assert round_blocks < worth < 2.5 * round_blocks


@pytest.mark.parametrize("gpu", ["L20", "RTX 5090"])
def test_nothing_is_worth_offloading_where_prompts_fill_the_steps_up_to_the_knee(gpu: str) -> None:
    """With the prompts that ShareGPT's outputs bring with them, mixed into the steps."""
    assert worth_offloading(outlook_of(stage_of(gpu), 343.76 / 237.20)) is None


def test_prompts_in_the_steps_lower_the_gain_below_the_knee() -> None:
    decode_only, mixed = (outlook_of(stage_of("RTX 3090"), ratio) for ratio in (0.0, 1.45))
    assert decode_only.blocks_per_s is not None
    first, second = (forecast_gain(o, decode_only.blocks_per_s) for o in (decode_only, mixed))
    assert first is not None
    assert second is not None
    assert 1.2 < second[0] < first[0] - 0.2
