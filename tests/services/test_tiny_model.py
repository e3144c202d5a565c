"""The model made here is one transformers loads and generates with, the same every time."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from pipemax.coordinator.text import TextProcessor
from pipemax.proto.errors import ConfigError
from pipemax.services.batch.openai_lines import parse_line
from pipemax.services.tiny_model import (
    BOS,
    EOS,
    SHAPE_100M,
    ModelShape,
    _tensors,
    demo_requests,
    make_demo_model,
    to_bfloat16,
)

SMALL = ModelShape(
    num_layers=2, hidden_size=32, intermediate_size=64, num_heads=4, num_kv_heads=2, vocab_size=400
)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_demo_model(tmp_path_factory.mktemp("demo"))


def load(model_dir: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype="auto").eval()


def test_transformers_loads_and_generates(model_dir: Path) -> None:
    model, tokenizer = load(model_dir), AutoTokenizer.from_pretrained(model_dir)
    assert model.dtype == torch.float32
    assert len(tokenizer) == model.config.vocab_size == 1024
    assert (tokenizer.bos_token, tokenizer.eos_token) == (BOS, EOS)
    generation = GenerationConfig.from_pretrained(model_dir)
    assert generation.eos_token_id == tokenizer.eos_token_id
    outputs = []
    for text in ("The mill is", "Butter, cream and fish"):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        assert ids[0, 0] == tokenizer.bos_token_id
        result = model.generate(ids, max_new_tokens=48, do_sample=False)[0, ids.shape[1] :]
        outputs.append(result.tolist())
        assert len(set(outputs[-1])) > 20, "greedy output must not fall into a loop"
    assert outputs[0] != outputs[1]


def test_greedy_choices_are_not_close(model_dir: Path) -> None:
    """Exactness tests compare tokens: the likeliest must lead by far more than rounding."""
    model, tokenizer = load(model_dir), AutoTokenizer.from_pretrained(model_dir)
    text = " ".join(r["body"].get("prompt", "") for r in demo_requests(16))
    ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :512]
    with torch.no_grad():
        best = model(ids).logits[0].topk(2).values
    gaps = best[:, 0] - best[:, 1]
    assert gaps.median() > 0.1
    assert (gaps < 1e-4).sum() <= 1


def test_our_text_side_reads_it(model_dir: Path) -> None:
    processor = TextProcessor(model_dir)
    reference = AutoTokenizer.from_pretrained(model_dir)
    assert processor.eos_token_ids == {reference.eos_token_id}
    for request in demo_requests():
        parsed = parse_line(json.dumps(request).encode(), "demo")
        token_ids = list(processor.encode(parsed.submit, 2048))
        if parsed.submit.messages:
            chat = list(parsed.submit.messages)
            expected = reference.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        else:
            expected = reference(parsed.submit.prompt)["input_ids"]
        assert token_ids == expected


def test_same_arguments_same_files(tmp_path: Path) -> None:
    one, two = (make_demo_model(tmp_path / name, 3, SMALL) for name in ("one", "two"))
    other = make_demo_model(tmp_path / "other", 4, SMALL)
    names = sorted(path.name for path in one.iterdir())
    assert names == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    for name in names:
        assert (one / name).read_bytes() == (two / name).read_bytes()
    weights = "model.safetensors"
    assert (one / weights).read_bytes() != (other / weights).read_bytes()


def test_bfloat16_weights_are_the_rounded_float32_ones(tmp_path: Path) -> None:
    single = load(make_demo_model(tmp_path / "f", 0, SMALL)).state_dict()
    shape = ModelShape(**{**as_dict(SMALL), "dtype": "bfloat16"})
    half = load(make_demo_model(tmp_path / "b", 0, shape)).state_dict()
    assert single.keys() == half.keys()
    for name, values in half.items():
        assert values.dtype == torch.bfloat16
        assert torch.equal(values, single[name].to(torch.bfloat16))


def as_dict(shape: ModelShape) -> dict[str, Any]:
    return {name: getattr(shape, name) for name in ModelShape.__slots__}


def test_rounding_to_bfloat16() -> None:
    values = np.array([0.0, -0.0, 1.0, 1.00390625, 1.01171875, -3.14159, 1e-40, 3e38], np.float32)
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy()
    assert to_bfloat16(values).tolist() == expected.tolist()


def test_the_benchmark_shape_has_about_100_million_parameters() -> None:
    parameters = sum(int(np.prod(dims)) for _, dims, _ in _tensors(SHAPE_100M))
    assert 95e6 < parameters < 110e6


def test_a_vocabulary_larger_than_the_text_gives(tmp_path: Path) -> None:
    shape = ModelShape(**{**as_dict(SMALL), "vocab_size": 5000})
    folder = make_demo_model(tmp_path, 0, shape)
    assert load(folder).config.vocab_size == 5000
    processor = TextProcessor(folder)
    assert processor.vocab_size == 5000
    assert processor.decode((4999,), True) == ""


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vocab_size": 100}, "vocab_size 100"),
        ({"hidden_size": 30}, "hidden_size 30"),
        ({"num_kv_heads": 3}, "num_kv_heads 3"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        make_demo_model(tmp_path / "m", 0, ModelShape(**{**as_dict(SMALL), **changes}))
    assert not (tmp_path / "m").exists()


def test_a_folder_that_cannot_be_written() -> None:
    with pytest.raises(ConfigError, match="cannot write the model"):
        make_demo_model(Path("/proc/model"), 0, SMALL)


def test_demo_requests_are_mixed_and_the_same_every_time() -> None:
    requests = demo_requests()
    assert len(requests) == 64
    assert requests == demo_requests()
    assert requests != demo_requests(seed=1)
    submits = [parse_line(json.dumps(r).encode(), "demo").submit for r in requests]
    assert len({r["custom_id"] for r in requests}) == 64
    assert {submit.messages is None for submit in submits} == {True, False}
    assert {submit.sampling.temperature for submit in submits} == {0.0, 0.8}
    assert all(s.sampling.seed is not None for s in submits if s.sampling.temperature)
    assert len({submit.sampling.max_tokens for submit in submits}) > 20
    lengths = [len(submit.prompt) for submit in submits if submit.prompt]
    assert max(lengths) > 10 * min(lengths)
    assert [r["body"]["model"] for r in demo_requests(2, model="x")] == ["x", "x"]


def test_torch_is_not_needed() -> None:
    code = (
        "import sys, pipemax.services.tiny_model, pipemax.services.batch.job\n"
        "print({'torch', 'transformers'} & {*sys.modules})"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout == "set()\n"
