"""Every supported family: PipeMax's greedy tokens are those of transformers' own `generate`."""

import json
import random
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers

from pipemax.stage_worker.model.families import FAMILIES as SUPPORTED
from support.model_zoo import FAMILIES, WINDOW, build_model, reference_tokens
from support.paged_run import Item, generate, load_stages, run_step, step_plan

_NUM_BLOCKS = 120
_WINDOWED = ("mistral", "qwen2", "gemma2", "gemma3", "phi3")


def _prompts() -> list[list[int]]:
    rng = random.Random(7)
    return [[rng.randrange(3, 512) for _ in range(length)] for length in (1, 5, 34, 150, 100, 2)]


_LIMITS = [30, 1, 24, 30, 20, 40]


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory):
    @cache
    def build(family: str) -> tuple[Path, list[list[int]]]:
        directory = build_model(family, tmp_path_factory.mktemp(family))
        return directory, reference_tokens(directory, _prompts(), _LIMITS)

    return build


def test_every_supported_family_is_tested() -> None:
    assert set(FAMILIES) == {family.name for family in SUPPORTED}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layer_split", [(4,), (2, 2), (1, 2, 1)], ids=str)
def test_tokens_equal_those_of_transformers(
    model_of, family: str, layer_split: tuple[int, ...]
) -> None:
    directory, expected = model_of(family)
    block_size = 8 if len(layer_split) == 2 else 16
    stages = load_stages(directory, layer_split, block_size=block_size, num_blocks=_NUM_BLOCKS)
    # One stage takes whole prompts at once, the others cut them into chunks.
    found = generate(
        stages,
        _prompts(),
        _LIMITS,
        num_blocks=_NUM_BLOCKS,
        largest_chunk=1000 if len(layer_split) == 1 else 40,
        seed=len(layer_split),
    )
    assert found == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_the_models_answers_vary(model_of, family: str) -> None:
    _, expected = model_of(family)
    assert len({token for answer in expected for token in answer}) >= 30


@pytest.mark.parametrize("family", _WINDOWED)
def test_the_window_decides_tokens(model_of, family: str, tmp_path: Path) -> None:
    """Or the exactness test would pass with the window ignored."""
    directory, expected = model_of(family)
    for path in directory.iterdir():
        (tmp_path / path.name).symlink_to(path)
    config = json.loads((directory / "config.json").read_text())
    assert config["sliding_window"] == WINDOW
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps({**config, "sliding_window": 1000}))
    assert reference_tokens(tmp_path, _prompts(), _LIMITS) != expected


_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_LINEAR = {"rope_type": "linear", "factor": 8.0}


@pytest.mark.parametrize("scaling", [_YARN, _LLAMA3, _LINEAR], ids=lambda rope: rope["rope_type"])
def test_rotary_scalings_that_are_accepted(tmp_path: Path, scaling: dict[str, object]) -> None:
    rope = {"rope_theta": 10000.0, **scaling}
    directory = build_model("llama", tmp_path, rope_parameters=rope)
    expected = reference_tokens(directory, _prompts(), _LIMITS)
    stages = load_stages(directory, (2, 2), block_size=8, num_blocks=_NUM_BLOCKS)
    assert generate(stages, _prompts(), _LIMITS, num_blocks=_NUM_BLOCKS) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_reference_attention_gives_the_same_tokens(model_of, family: str) -> None:
    directory, expected = model_of(family)
    stages = load_stages(
        directory, (4,), block_size=16, num_blocks=_NUM_BLOCKS, backend="reference"
    )
    assert generate(stages, _prompts(), _LIMITS, num_blocks=_NUM_BLOCKS) == expected


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "mixtral"])
@torch.inference_mode()
def test_logits_equal_those_of_transformers(model_of, family: str) -> None:
    """Greedy tokens do not show a soft-cap or a scale on the logits; sampling does."""
    directory, _ = model_of(family)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype="auto", attn_implementation="eager"
    )
    prompt = _prompts()[4]
    expected = model(torch.tensor([prompt])).logits[0, -1]
    stages = load_stages(directory, (3, 1), block_size=8, num_blocks=_NUM_BLOCKS)
    blocks = random.Random(1).sample(range(_NUM_BLOCKS), 13)
    found = run_step(stages, step_plan([Item(prompt, 0, blocks)]))
    torch.testing.assert_close(found[0], expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@torch.inference_mode()
def test_half_precision_stays_near_float32(tmp_path: Path, dtype: str) -> None:
    directory = build_model("llama", tmp_path, dtype=dtype)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    prompt = _prompts()[4]
    expected = model(torch.tensor([prompt])).logits[0, -4:]
    stages = load_stages(directory, (2, 2), block_size=8, num_blocks=_NUM_BLOCKS)
    assert stages[0].dtype == getattr(torch, dtype)
    blocks = list(range(13))
    run_step(stages, step_plan([Item(prompt[:-4], 0, blocks)]))
    found = torch.cat(
        [
            run_step(stages, step_plan([Item([token], len(prompt) - 4 + index, blocks)]))
            for index, token in enumerate(prompt[-4:])
        ]
    )
    assert found.dtype == torch.float32
    assert torch.corrcoef(torch.stack([found.flatten(), expected.flatten()]))[0, 1] > 0.995
