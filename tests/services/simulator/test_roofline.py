"""The performance model against the figures it was taken from."""

import pytest

from pipemax.proto.errors import ConfigError
from pipemax.services.simulator.catalogue import load_catalogue
from pipemax.services.simulator.roofline import (
    Efficiencies,
    StageModel,
    StepLoad,
    decode_forecast,
    end_to_end_tokens_s,
)

CATALOGUE = load_catalogue()
SHAREGPT_CONTEXT = 343.76 + 237.20 / 2


def stage_of(model: str, gpu: str, stages: int = 8, **more: float) -> StageModel:
    shape = CATALOGUE.model(model)
    efficiencies = Efficiencies(**more)  # type: ignore[arg-type]
    return StageModel(CATALOGUE.gpu(gpu), shape, shape.num_layers // stages, efficiencies)


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


@pytest.mark.parametrize(
    ("gpu", "knee"), [("rtx-3090", 74), ("rtx-5090", 114), ("l20", 135), ("a10", 204)]
)
def test_the_compute_knee(gpu: str, knee: int) -> None:
    assert stage_of("llama-2-70b", gpu).knee == pytest.approx(knee, abs=1)


MEASURED_ON_L20 = {
    "llama-2-13b": [35.3, 47.8, 60.1, 69.3, 70.0, 95.7, 131.7, 258.5, 508.7],
    "qwen2_5-32b": [85.5, 116.5, 148.8, 155.1, 155.9, 234.9, 313.5, 596.7, 1207.7],
}
TOKENS = [1, 128, 129, 192, 256, 257, 512, 1024, 2048]


@pytest.mark.parametrize("model", MEASURED_ON_L20)
def test_the_staircase_has_the_shape_of_the_measured_one(model: str) -> None:
    """Whole models on one L20, milliseconds by tokens in the batch; GEMM at 90 % of peak as
    measured there. Attention is not part of that table."""
    stage = stage_of(model, "l20", 1, gemm_staircase=True, gemm=0.9, t_fix_s=0)
    for tokens, measured_ms in zip(TOKENS, MEASURED_ON_L20[model], strict=True):
        assert stage.step_s(StepLoad(tokens, 0)) * 1e3 == pytest.approx(measured_ms, rel=0.12)
    assert stage.step_s(StepLoad(129, 0)) > 1.2 * stage.step_s(StepLoad(128, 0))


def test_experts_are_streamed_as_far_as_they_are_used() -> None:
    stage = stage_of("mixtral-8x7b", "l20")
    one, few, many = (stage.decode_s(rows, 0) for rows in (1, 4, 60))
    streamed_s = (one - stage.efficiencies.t_fix_s) * 0.87 * 864e9
    assert streamed_s == pytest.approx(12.9e9 * 2 / 8, rel=1e-6)
    assert one < few < many
    assert many == pytest.approx(46.7e9 * 2 / 8 / (0.87 * 864e9) + 0.3e-3, rel=1e-6)


def test_prompts_cost_compute_unless_they_are_declared_free() -> None:
    paid = stage_of("llama-2-70b", "l20")
    free = StageModel(paid.gpu, paid.model, 10, free_prefill=True)
    load = StepLoad(0, 1000, prefill_rows=500, prefill_pairs=10**8, prefill_context=10**5)
    assert free.step_s(load) == free.decode_s(0, 1000)
    assert paid.step_s(load) > 2 * free.step_s(load)
    assert paid.prefill_tokens_s(200) > paid.prefill_tokens_s(20_000)


def test_weights_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"use more GPUs or larger ones"):
        _ = stage_of("llama-2-70b", "rtx-3090", 4).kv_bytes


def test_end_to_end_weighs_both_phases() -> None:
    assert end_to_end_tokens_s(100, 100, 1000.0, 10.0) == pytest.approx(200 / 10.1)
