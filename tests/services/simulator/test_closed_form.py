"""The closed form against the figures it was derived with."""

import pytest

from pipemax.services.simulator.closed_form import decode_forecast, end_to_end_tokens_s
from pipemax.stage_worker.modelled.catalogue import load_catalogue
from pipemax.stage_worker.modelled.roofline import StageModel

CATALOGUE = load_catalogue()
SHAREGPT_CONTEXT = 343.76 + 237.20 / 2


def stage_of(model: str, gpu: str) -> StageModel:
    shape = CATALOGUE.model(model)
    return StageModel(CATALOGUE.gpu(gpu), shape, shape.num_layers // 8)


@pytest.mark.parametrize(
    ("gpu", "gain"),
    [("RTX 3090", 1.87), ("RTX 4090", 1.81), ("A10", 2.35), ("RTX 5090", 1.30), ("L20", 1.00)],
)
def test_the_closed_form_gives_the_expected_gains(gpu: str, gain: float) -> None:
    """Llama-2-70B in bfloat16 on 8 GPUs, decode only. Assumes: every request at the mean context
    of ShareGPT (in + out/2), the whole pool in use, HBM .87, GEMM .85, attention .75, link .9 of
    the effective rate, 92 % of memory less 1.5 GB, 0.3 ms fixed, 8 slots, 2 staging buffers, no
    GEMM staircase."""
    stage = stage_of("llama-2-70b", gpu)
    without = decode_forecast(stage, 8, SHAREGPT_CONTEXT, offload=False)
    with_it = decode_forecast(stage, 8, SHAREGPT_CONTEXT, offload=True)
    assert with_it.tokens_s / without.tokens_s == pytest.approx(gain, abs=0.006)


def test_a_32b_model_gains_little_everywhere() -> None:
    for gpu in CATALOGUE.gpus:
        stage = stage_of("Qwen2.5-32B", gpu)
        without = decode_forecast(stage, 8, SHAREGPT_CONTEXT, offload=False)
        with_it = decode_forecast(stage, 8, SHAREGPT_CONTEXT, offload=True)
        assert 0.999 < with_it.tokens_s / without.tokens_s < 1.18


def test_end_to_end_weighs_both_phases() -> None:
    assert end_to_end_tokens_s(100, 100, 1000.0, 10.0) == pytest.approx(200 / 10.1)
