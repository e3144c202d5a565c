"""Incremental decoding equals decoding at once, and never shows part of a character."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from pipemax.coordinator.text import Detokenizer, StopChecker, TextProcessor
from pipemax.proto.messages.ingest import SamplingParams

from .conftest import write_model_dir


@pytest.fixture(scope="session", params=["byte_level", "byte_fallback"])
def processor(request: pytest.FixtureRequest, model_dirs: dict[str, Path]) -> TextProcessor:
    return TextProcessor(model_dirs[request.param])


def pieces_of(processor: TextProcessor, token_ids: list[int], skip: bool) -> Iterator[str]:
    detokenizer = Detokenizer(processor, skip)
    for token_id in token_ids:
        yield detokenizer.append(token_id)
    yield detokenizer.finish()


@given(data=st.data(), skip=st.booleans())
@settings(max_examples=150, deadline=None)
def test_random_tokens_read_as_at_once(
    processor: TextProcessor, data: st.DataObject, skip: bool
) -> None:
    token = st.integers(0, processor.vocab_size - 1)
    token_ids = data.draw(st.lists(token, max_size=30))
    assert "".join(pieces_of(processor, token_ids, skip)) == processor.decode(token_ids, skip)


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_loose_bytes_read_as_at_once(processor: TextProcessor, data: st.DataObject) -> None:
    """Mostly tokens of one byte, so that characters are torn and windows grow long."""
    single = single_byte_tokens(processor)
    token = st.sampled_from(single)
    limit = 30 if processor.is_loose_byte(single[0]) else 150
    token_ids = data.draw(st.lists(token, max_size=limit))
    assert "".join(pieces_of(processor, token_ids, False)) == processor.decode(token_ids, False)


def test_tokens_that_end_one_character_and_begin_the_next(tmp_path: Path) -> None:
    """€ is E2 82 AC. With a token of AC E2 no token but the last ends where a character does, so
    the window grows until it is cut within characters."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(vocab={t: i for i, t in enumerate([*letters, "¬â"])}, merges=[("¬", "â")])
    )
    tokenizer.decoder = decoders.ByteLevel()
    processor = TextProcessor(write_model_dir(tmp_path, tokenizer))
    single = single_byte_tokens(processor)
    lead, middle, last = (single[byte] for byte in "€".encode())
    both = tokenizer.get_vocab()["¬â"]
    for count in range(60, 64):
        token_ids = [lead, *[middle, both] * count, middle, last]
        pieces = list(pieces_of(processor, token_ids, True))
        assert "".join(pieces) == "€" * (count + 1)
        assert set("".join(pieces[:40])) == {"€"}


@given(text=st.text(max_size=40))
@settings(max_examples=150, deadline=None)
def test_no_piece_holds_part_of_a_character(processor: TextProcessor, text: str) -> None:
    token_ids = list(encoding_of(processor, text))
    pieces = list(pieces_of(processor, token_ids, True))
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) == processor.decode(token_ids, True)


@pytest.mark.parametrize("text", ["🙂👩‍🚀 水は x", "é" * 50, "水" * 200])
def test_characters_of_several_tokens(processor: TextProcessor, text: str) -> None:
    token_ids = list(encoding_of(processor, text))
    pieces = list(pieces_of(processor, token_ids, True))
    assert len(token_ids) > len(text) / 2
    assert "".join(pieces) == text
    assert len([piece for piece in pieces if piece]) > 1, "text must not be held back to the end"


def test_an_endless_run_of_bad_bytes_keeps_the_window_short(processor: TextProcessor) -> None:
    bad = single_byte_tokens(processor)[0x80]
    asked: list[int] = []

    class Counting:
        is_special = staticmethod(processor.is_special)
        is_loose_byte = staticmethod(processor.is_loose_byte)

        @staticmethod
        def decode(token_ids: Sequence[int], skip_special_tokens: bool) -> str:
            asked.append(len(token_ids))
            return processor.decode(token_ids, skip_special_tokens)

    detokenizer = Detokenizer(Counting(), True)
    for _ in range(500):
        detokenizer.append(bad)
    assert max(asked) < 80
    assert detokenizer.text == processor.decode([bad] * 500, True)


def tokenizer_of(processor: TextProcessor) -> Tokenizer:
    tokenizer = processor._tokenizer
    assert tokenizer is not None
    return tokenizer


def encoding_of(processor: TextProcessor, text: str) -> list[int]:
    tokenizer = tokenizer_of(processor)
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


def single_byte_tokens(processor: TextProcessor) -> list[int]:
    """Token ids by the byte they stand for."""
    vocabulary = tokenizer_of(processor).get_vocab()
    if "<0x00>" in vocabulary:
        return [vocabulary[f"<0x{byte:02X}>"] for byte in range(256)]
    # GPT-2's table: printable bytes stand for themselves, the others for U+0100 and up.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    letters = [chr(byte if byte in printable else next(others)) for byte in range(256)]
    return [vocabulary[letter] for letter in letters]


def run(
    processor: TextProcessor, text: str, sampling: SamplingParams
) -> tuple[StopChecker, str | None, int]:
    """Feeds `text` token by token until a stop string is met: checker, string, tokens taken."""
    checker = StopChecker(processor, sampling)
    token_ids = encoding_of(processor, text)
    for count, token_id in enumerate(token_ids, 1):
        met = checker.append(token_id)
        if met is not None:
            return checker, met, count
    return checker, None, len(token_ids)


TEXT = "The pump lifts water 水は🙂 from the well, and the pipe carries it."


@pytest.mark.parametrize(
    "stop", ["water", "r 水", "🙂", "水は🙂 fr", "T", "it.", "p l", "The pump"]
)
@pytest.mark.parametrize("include", [False, True])
def test_stop_string_across_tokens(processor: TextProcessor, stop: str, include: bool) -> None:
    sampling = SamplingParams(stop=(stop,), include_stop_str_in_output=include)
    checker, met, count = run(processor, TEXT, sampling)
    before = TEXT[: TEXT.index(stop)]
    assert met == stop
    assert checker.text() == before + (stop if include else "")
    # Not one token later than needed: without the last token it was not complete.
    token_ids = encoding_of(processor, TEXT)
    assert stop in processor.decode(token_ids[:count], True)
    assert stop not in processor.decode(token_ids[: count - 1], True)


@given(
    stops=st.lists(st.text(alphabet="ab 水", min_size=1, max_size=4), min_size=1, max_size=4),
    text=st.text(alphabet="ab 水c", min_size=1, max_size=30),
)
@settings(max_examples=150, deadline=None)
def test_the_first_stop_string_completed_is_met(
    processor: TextProcessor, stops: list[str], text: str
) -> None:
    sampling = SamplingParams(stop=tuple(stops))
    checker, met, _ = run(processor, text, sampling)
    shown = processor.decode(encoding_of(processor, text), True)
    ends = [(shown.index(s) + len(s), shown.index(s), s) for s in stops if s in shown]
    if not ends:
        assert met is None
        assert checker.text() == shown
        return
    _, start, expected = min(ends)
    assert met == expected
    assert checker.text() == shown[:start]


def test_min_tokens_hides_stop_strings_at_first(processor: TextProcessor) -> None:
    text = "water and water"
    token_ids = encoding_of(processor, text)
    for min_tokens in range(len(token_ids)):
        sampling = SamplingParams(stop=("water",), min_tokens=min_tokens)
        checker, met, count = run(processor, text, sampling)
        hidden = "water" in processor.decode(token_ids[:min_tokens], True)
        assert met == "water"
        assert count > min_tokens
        assert checker.text() == ("water and " if hidden else "")


def test_without_stop_strings_nothing_is_decoded_before_the_end(processor: TextProcessor) -> None:
    checker, met, _ = run(processor, TEXT, SamplingParams())
    assert met is None
    assert checker._detokenizer is None
    assert checker.text() == TEXT


def test_the_token_that_stopped_is_left_out(processor: TextProcessor) -> None:
    token_ids = encoding_of(processor, "water and")
    last = processor.decode(token_ids, True)[len(processor.decode(token_ids[:-1], True)) :]
    for include in (False, True):
        sampling = SamplingParams(stop=("never",), include_stop_str_in_output=include)
        checker, _, _ = run(processor, "water and", sampling)
        kept = "water and" if include else "water and".removesuffix(last)
        assert checker.text(stopped_by_token=True) == kept
        assert checker.text() == "water and"


def test_without_a_tokenizer_text_is_empty() -> None:
    checker = StopChecker(None, SamplingParams())
    assert checker.append(5) is None
    assert checker.text() == ""
