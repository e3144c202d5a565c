"""What a stream shows of a text is the front part of the result's text, and no part of a stop
string that ends it."""

from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipemax.coordinator.text import StopChecker, TextProcessor
from pipemax.proto.messages.ingest import SamplingParams


@pytest.fixture(scope="session", params=["byte_level", "byte_fallback"])
def processor(request: pytest.FixtureRequest, model_dirs: dict[str, Path]) -> TextProcessor:
    return TextProcessor(model_dirs[request.param])


def show(
    processor: TextProcessor, token_ids: list[int], sampling: SamplingParams
) -> tuple[list[str], str]:
    """What a reader of every token would be shown after each, and the result's text."""
    checker = StopChecker(processor, sampling, stream=True)
    pieces: list[str] = []
    for token_id in token_ids:
        if checker.append(token_id) is not None:
            break
        pieces.append(checker.sure_text(sum(map(len, pieces))))
    return pieces, checker.text()


texts = st.text("aab ü水", max_size=30)


@given(
    text=texts,
    stop=st.lists(st.text("aab ü水", min_size=1, max_size=5), max_size=3),
    included=st.booleans(),
    min_tokens=st.integers(0, 6),
)
@example(text="aaab", stop=["aab"], included=False, min_tokens=0)
@example(text="a水b", stop=["水a", "a水b"], included=False, min_tokens=2)
@settings(max_examples=200, deadline=None)
def test_shown_text_stays(
    processor: TextProcessor, text: str, stop: list[str], included: bool, min_tokens: int
) -> None:
    token_ids = list(processor._encode_text("x" + text, 400, add_special_tokens=False))
    sampling = SamplingParams(
        stop=tuple(stop),
        include_stop_str_in_output=included,
        min_tokens=min_tokens,
        max_tokens=None,
    )
    pieces, result = show(processor, token_ids, sampling)
    assert result.startswith("".join(pieces))


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_random_tokens_too(processor: TextProcessor, data: st.DataObject) -> None:
    token = st.integers(0, processor.vocab_size - 1)
    token_ids = data.draw(st.lists(token, max_size=30))
    pieces, result = show(processor, token_ids, SamplingParams(max_tokens=None))
    assert result.startswith("".join(pieces))


def test_text_is_shown_as_soon_as_it_is_sure(processor: TextProcessor) -> None:
    token_ids = list(processor._encode_text("The pump lifts", 400, add_special_tokens=False))
    pieces, result = show(processor, token_ids, SamplingParams(max_tokens=None))
    assert "".join(pieces) == result
    assert sum(map(bool, pieces)) > 1
    pieces, result = show(processor, token_ids, SamplingParams(stop=("pump!",), max_tokens=None))
    assert "".join(pieces) == result, "what turned out to be no stop string is shown"


def test_what_may_become_a_stop_string_is_held_back(processor: TextProcessor) -> None:
    token_ids = list(processor._encode_text("The pump", 400, add_special_tokens=False))
    pieces, result = show(processor, token_ids, SamplingParams(stop=("pump!",), max_tokens=None))
    assert result.endswith("The pump")
    assert "".join(pieces) == result.removesuffix("pump")
