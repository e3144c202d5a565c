"""The performance model against the figures it was taken from."""

import pytest

from pipemax.proto.errors import ConfigError
from pipemax.stage_worker.modelled.catalogue import load_catalogue
from pipemax.stage_worker.modelled.roofline import Efficiencies, StageModel, StepLoad

CATALOGUE = load_catalogue()


def stage_of(model: str, gpu: str, stages: int = 8, **more: float) -> StageModel:
    shape = CATALOGUE.model(model)
    efficiencies = Efficiencies(**more)  # type: ignore[arg-type]
    return StageModel(CATALOGUE.gpu(gpu), shape, shape.num_layers // stages, efficiencies)


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
