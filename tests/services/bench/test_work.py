"""Requests of a benchmark: lengths drawn, conversations, lines with token ids."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipemax.proto.errors import ConfigError
from pipemax.services.bench.data_flags import dataset_record, load_data
from pipemax.services.bench.work import (
    BenchRequest,
    jsonl_data,
    lognormal_data,
    output_tokens,
    prompt_tokens,
    sharegpt_data,
)
from pipemax.services.cli.bench_flags import WorkFlags
from pipemax.services.tiny_model import train_tokenizer


def lognormal(num_prompts: int = 400, seed: int = 3, sigma: float = 0.6) -> Any:
    return lognormal_data(num_prompts, 128, 96, sigma, vocab_size=1000, seed=seed)


def test_lognormal_lengths_have_their_means_and_are_the_same_again() -> None:
    work = lognormal().round(0)
    assert len(work) == 400
    assert prompt_tokens(work) / 400 == pytest.approx(128, rel=0.15)
    assert output_tokens(work) / 400 == pytest.approx(96, rel=0.15)
    assert work == lognormal().round(0)
    assert work != lognormal(seed=4).round(0)


def test_sigma_zero_makes_all_alike() -> None:
    assert {(len(r.prompt_token_ids), r.output_tokens) for r in lognormal(9, sigma=0).round(0)} == {
        (128, 96)
    }


def test_rounds_have_the_same_lengths_and_other_tokens() -> None:
    first, second = lognormal(5).round(0), lognormal(5).round(1)
    assert [r.total_tokens for r in first] == [r.total_tokens for r in second]
    pairs = zip(first, second, strict=True)
    assert all(a.prompt_token_ids != b.prompt_token_ids for a, b in pairs)


def test_tokens_are_in_the_vocabulary_and_not_the_special_ones() -> None:
    ids = {token for request in lognormal().round(0) for token in request.prompt_token_ids}
    assert min(ids) >= 300
    assert max(ids) < 1000


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(300).save(str(path))
    return path


def conversations(path: Path, *pairs: tuple[str, ...]) -> Path:
    turns = [{"conversations": [{"from": "x", "value": text} for text in pair]} for pair in pairs]
    path.write_text(json.dumps(turns))
    return path


def test_sharegpt_takes_the_first_two_turns(tmp_path: Path, tokenizer: Path) -> None:
    path = conversations(
        tmp_path / "c.json",
        ("water flows down the hill", "stone stays where it is", "a third turn is ignored"),
        ("alone, without an answer",),
        ("hi", ""),  # the answer is too short
        ("z" * 3000, "an answer to a prompt that is too long"),
    )
    (request,) = sharegpt_data(path, 1, tokenizer, output_len=None, seed=0).work
    made = train_tokenizer(300)
    assert request.prompt_token_ids == made.encode("water flows down the hill").ids
    answer = made.encode("stone stays where it is", add_special_tokens=False)
    assert request.output_tokens == len(answer.ids)
    (fixed,) = sharegpt_data(path, 1, tokenizer, output_len=33, seed=0).work[:1]
    assert fixed.output_tokens == 33
    with pytest.raises(ConfigError, match="holds 1 conversations of a length that fits, 2 are"):
        sharegpt_data(path, 2, tokenizer, output_len=None, seed=0)


def test_sharegpt_draws_with_the_seed(tmp_path: Path, tokenizer: Path) -> None:
    pairs = [(f"question number {n} is this", "and this is its answer") for n in range(20)]
    path = conversations(tmp_path / "c.json", *pairs)

    def drawn(seed: int) -> tuple[BenchRequest, ...]:
        return sharegpt_data(path, 5, tokenizer, output_len=None, seed=seed).work

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


@pytest.mark.parametrize("text", ["{}", "[{}]", '[{"conversations": [{}, {}]}]', "no JSON"])
def test_a_file_that_is_not_sharegpt_is_refused(text: str, tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(ConfigError, match=r"c\.json"):
        sharegpt_data(tmp_path / "c.json", 1, tokenizer, output_len=None, seed=0)


def lines(path: Path, *texts: str) -> Path:
    path.write_text("\n".join(texts) + "\n")
    return path


GOOD = '{"prompt_token_ids": [5, 6, 7], "output_tokens": 9}'


def test_jsonl_has_token_ids_and_exact_lengths(tmp_path: Path) -> None:
    path = lines(tmp_path / "w.jsonl", GOOD, "", '{"prompt_token_ids": [1], "output_tokens": 1}')
    assert jsonl_data(path, None, 10).work == (BenchRequest([5, 6, 7], 9), BenchRequest([1], 1))
    assert jsonl_data(path, 1, 10).round(7) == (BenchRequest([5, 6, 7], 9),)
    with pytest.raises(ConfigError, match="holds 2 requests, 3 are asked for"):
        jsonl_data(path, 3, 10)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("[]", "prompt_token_ids and output_tokens"),
        ('{"prompt_token_ids": [1]}', "prompt_token_ids and output_tokens"),
        ('{"prompt_token_ids": [], "output_tokens": 1}', "token id below 10"),
        ('{"prompt_token_ids": [10], "output_tokens": 1}', "token id below 10"),
        ('{"prompt_token_ids": [true], "output_tokens": 1}', "token id below 10"),
        ('{"prompt_token_ids": [1], "output_tokens": 0}', "output_tokens is 0"),
        ('{"prompt_token_ids": [1], "output_tokens": 1.5}', "output_tokens is 1.5"),
    ],
)
def test_a_bad_line_is_named(line: str, reason: str, tmp_path: Path) -> None:
    path = lines(tmp_path / "w.jsonl", GOOD, line)
    with pytest.raises(ConfigError, match=rf"w\.jsonl:2: .*{reason}"):
        jsonl_data(path, None, 10)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ({"dataset_name": "hf"}, "hf is not one of lognormal, sharegpt, jsonl"),
        ({"dataset_name": "jsonl"}, "needs --dataset-path"),
        ({"dataset_path": Path("x")}, "--dataset-path does not go with --dataset-name lognormal"),
        (
            {"dataset_name": "jsonl", "dataset_path": Path("x"), "sigma": 0.5},
            "--sigma does not go",
        ),
        (
            {"dataset_name": "sharegpt", "dataset_path": Path("x"), "output_len": 1.5},
            "not a whole number",
        ),
        ({"sigma": 9.0}, "makes no sense"),
    ],
)
def test_flags_that_do_not_fit_are_refused(flags: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        load_data(WorkFlags(**flags), Path("model"), 1000, 0)


def test_the_record_names_what_was_not_given() -> None:
    assert dataset_record(WorkFlags(input_len=7.0), 3) == {
        "dataset_name": "lognormal",
        "seed": 3,
        "input_len": 7.0,
        "output_len": 96.0,
        "sigma": 0.6,
    }
