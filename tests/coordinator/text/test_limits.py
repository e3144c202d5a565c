"""What depends on the prompt, the model or two fields at once is checked before admission."""

import pytest

from pipemax.coordinator.text import check_sampling
from pipemax.proto.errors import RequestError
from pipemax.proto.messages.ingest import SamplingParams, StructuredOutputs


def check(prompt_len: int = 10, **fields: object) -> SamplingParams:
    params = SamplingParams(**fields)  # type: ignore[arg-type]
    return check_sampling(params, 100, 64, prompt_len, eos_token_ids=frozenset({2}))


def test_max_tokens_is_resolved() -> None:
    assert check(max_tokens=None).max_tokens == 54
    assert check(max_tokens=54).max_tokens == 54
    assert check(prompt_len=63, max_tokens=None).max_tokens == 1


def test_the_rest_stays() -> None:
    params = SamplingParams(temperature=0.5, stop=("a",), seed=3, stop_token_ids=(0, 99))
    assert check_sampling(params, 100, 64, 10) == params


@pytest.mark.parametrize(
    ("fields", "code", "words"),
    [
        ({"max_tokens": 55}, "too_long", "prompt of 10 tokens plus max_tokens 55 is 65"),
        ({"prompt_len": 64, "max_tokens": None}, "too_long", "64 tokens plus one"),
        ({"prompt_len": 0}, "empty_prompt", "no tokens"),
        ({"min_tokens": 17}, "invalid_sampling", "min_tokens 17"),
        ({"min_tokens": 55, "max_tokens": None}, "invalid_sampling", "54 tokens"),
        ({"stop_token_ids": (5, 100)}, "invalid_sampling", "100 is not in the vocabulary"),
        ({"allowed_token_ids": (5, 101)}, "invalid_sampling", "allowed_token_ids: 101 is not"),
        ({"logit_bias": {100: 1.0}}, "invalid_sampling", "logit_bias: 100 is not"),
        *[
            ({"structured_outputs": StructuredOutputs(regex="a"), **more}, "invalid_sampling", w)
            for more, w in [
                ({"min_tokens": 1}, "min_tokens does not go with structured_outputs"),
                ({"ignore_eos": True}, "ignore_eos does not go with"),
                ({"allowed_token_ids": (5,)}, "allowed_token_ids does not go with"),
            ]
        ],
        ({"n": 21000, "max_tokens": 50}, "invalid_sampling", "n 21000 times 50 output tokens"),
        (
            {"allowed_token_ids": (2, 7), "min_tokens": 1, "stop_token_ids": (7,)},
            "invalid_sampling",
            "nothing but tokens that end",
        ),
    ],
)
def test_refusals(fields: dict[str, object], code: str, words: str) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        check(**fields)  # type: ignore[arg-type]
    assert caught.value.code == code


def test_what_ends_the_output_may_be_all_that_is_allowed() -> None:
    fields = {"allowed_token_ids": (2, 7), "stop_token_ids": (7,)}
    check(**fields)
    check(**fields | {"min_tokens": 1, "ignore_eos": True, "stop_token_ids": ()})


@pytest.mark.parametrize("lacks", ["has_tokenizer", "eos_token_ids"])
def test_structured_outputs_need_words_and_an_end(lacks: str) -> None:
    params = SamplingParams(structured_outputs=StructuredOutputs(regex="a"))
    has = {"has_tokenizer": True, "eos_token_ids": frozenset({2})}
    assert check_sampling(params, 100, 64, 10, **has)
    with pytest.raises(RequestError, match="structured_outputs need"):
        check_sampling(params, 100, 64, 10, **has | {lacks: type(has[lacks])()})


def test_logprobs_fit_one_message() -> None:
    whole = SamplingParams(logprobs=15, prompt_logprobs=0, max_tokens=8000)
    assert check_sampling(whole, 100, 20_000, 3072)
    with pytest.raises(RequestError, match="128000 for 8000 output tokens and 3073"):
        check_sampling(whole, 100, 20_000, 3073)


@pytest.mark.parametrize("name", ["stop", "bad_words"])
def test_words_need_a_tokenizer(name: str) -> None:
    with pytest.raises(RequestError, match=r"tokenizer\.json"):
        check_sampling(SamplingParams(**{name: ("x",)}), 100, 64, 10, has_tokenizer=False)
