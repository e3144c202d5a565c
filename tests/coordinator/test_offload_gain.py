"""How much offloading is worth, on stages of which the cost is a formula."""

from dataclasses import replace

import pytest

from pipemax.coordinator.cost_model import PipelineCost
from pipemax.coordinator.offload_gain import OffloadOutlook, forecast_gain, worth_offloading
from pipemax.proto.messages.control import SweepSample

SLOTS = 8


def costs_of(fixed_s: float, per_row_s: float) -> PipelineCost:
    costs = PipelineCost(2)
    sweep = [SweepSample(b, 200 * b, 0, 0, fixed_s + per_row_s * b) for b in (1, 64, 128)]
    sweep += [SweepSample(0, 0, p, p * p // 2, fixed_s + per_row_s * p) for p in (64, 128, 512)]
    costs.warm_up([sweep, sweep])
    return costs


WEIGHTS = costs_of(0.02, 1e-9)
"""Steps take as long whatever is in them."""
ROWS = costs_of(1e-9, 1e-3)
"""Steps take as long as they have rows."""


def outlook(costs: PipelineCost, blocks_per_s: float | None = 1000.0) -> OffloadOutlook:
    """50 requests of 20 blocks on the device, 6.25 in each slot; the link brings 20 blocks in a
    step that only streams weights."""
    return OffloadOutlook(1000, SLOTS, 16, 2048, 20.0, 1.0, 0.0, blocks_per_s, costs)


def test_where_only_weights_cost_the_gain_is_that_of_the_batch() -> None:
    found = forecast_gain(outlook(WEIGHTS), 1000.0)
    assert found is not None
    gain, carried = found
    assert carried == pytest.approx(20.0, rel=0.01)
    # Two buffers of 20 blocks are shared by 8 slots: 15 blocks more for 125.
    assert gain == pytest.approx(1 + 15 / 125, rel=0.01)
    assert worth_offloading(outlook(WEIGHTS)) == pytest.approx(2 * SLOTS * 20, rel=0.02)


def test_where_rows_cost_nothing_is_worth_it() -> None:
    assert worth_offloading(outlook(ROWS)) is None


def test_a_slow_link_is_not_worth_its_copies() -> None:
    assert worth_offloading(outlook(WEIGHTS, 100.0)) is None
    assert worth_offloading(outlook(WEIGHTS, 600.0))


def test_the_staging_buffers_take_at_most_the_device() -> None:
    found = forecast_gain(outlook(WEIGHTS), 1e9)
    assert found is not None
    assert found[1] == 500


@pytest.mark.parametrize("slots", [1, 2])
def test_two_buffers_for_two_slots_leave_nothing_to_gain(slots: int) -> None:
    assert worth_offloading(replace(outlook(WEIGHTS), num_slots=slots)) is None


def test_before_the_link_or_the_stages_were_measured_a_quarter_is_enough_to_measure_them() -> None:
    assert worth_offloading(outlook(ROWS, None)) == 250
    assert worth_offloading(outlook(PipelineCost(2))) == 250
    assert worth_offloading(replace(outlook(ROWS, None), device_blocks=2)) == 1


def test_without_a_running_request_there_is_still_an_answer() -> None:
    assert worth_offloading(replace(outlook(WEIGHTS), request_blocks=0.0))


def test_room_kept_for_growth_is_a_gain_even_with_two_slots() -> None:
    """The host takes what grows beyond the device, so the whole pool can be in use."""
    kept = replace(outlook(WEIGHTS), num_slots=2, share_in_use=0.8)
    found = forecast_gain(kept, 1000.0)
    assert found is not None
    assert found[0] == pytest.approx(1 / 0.8, rel=0.02)
    assert worth_offloading(kept)


def test_where_steps_are_full_of_prompts_more_decodes_do_not_fit_in() -> None:
    """300 prompt tokens come with each output token: 6 requests nearly fill a step."""
    full = replace(outlook(WEIGHTS), prefill_per_output=300.0)
    found = forecast_gain(full, 1000.0)
    assert found is not None
    assert found[0] < 1.2
