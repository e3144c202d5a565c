"""Token ids and text are those of transformers' tokenizers; what cannot be served is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from pipemax.coordinator.text import TextProcessor
from pipemax.proto.errors import ModelError, RequestError
from pipemax.proto.messages.ingest import ChatOptions, Submit

from .conftest import CHAT_TEMPLATE, CORPUS, TOKENIZERS, byte_level_tokenizer, write_model_dir

LIMIT = 4096
PROMPTS = [*CORPUS[:4], " two  spaces ", "a</s>b<s>", "tab\tand\nline", "é🙂\u0301水", "<|user|>x"]


def prompt(text: str) -> Submit:
    return Submit(request_id="r", prompt=text)


@pytest.fixture(scope="session", params=TOKENIZERS)
def model_dir(request: pytest.FixtureRequest, model_dirs: dict[str, Path]) -> Path:
    return model_dirs[request.param]


@pytest.fixture(scope="session")
def processor(model_dir: Path) -> TextProcessor:
    return TextProcessor(model_dir)


@pytest.fixture(scope="session")
def reference(model_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(model_dir)


@pytest.mark.parametrize("text", PROMPTS)
def test_prompts_encode_as_in_transformers(
    processor: TextProcessor, reference: Any, text: str
) -> None:
    token_ids = list(processor.encode(prompt(text), LIMIT))
    assert token_ids == reference(text)["input_ids"]
    assert token_ids[0] == reference.bos_token_id


@given(text=st.text(min_size=1, max_size=60))
@settings(max_examples=100, deadline=None)
def test_any_text_encodes_as_in_transformers(
    processor: TextProcessor, reference: Any, text: str
) -> None:
    assert list(processor.encode(prompt(text), LIMIT)) == reference(text)["input_ids"]


@given(data=st.data(), skip=st.booleans())
@settings(max_examples=100, deadline=None)
def test_any_tokens_decode_as_in_transformers(
    processor: TextProcessor, reference: Any, data: st.DataObject, skip: bool
) -> None:
    token_ids = data.draw(st.lists(st.integers(0, processor.vocab_size - 1), max_size=30))
    expected = reference.decode(token_ids, skip_special_tokens=skip)
    assert processor.decode(token_ids, skip) == expected


def test_special_tokens_are_those_of_transformers(processor: TextProcessor, reference: Any) -> None:
    special = {i for i in range(processor.vocab_size) if processor.is_special(i)}
    added = reference.added_tokens_decoder
    assert special == {i for i, token in added.items() if token.special}
    assert reference.bos_token_id in special


def test_chats_encode_as_in_transformers(processor: TextProcessor, reference: Any) -> None:
    messages = ({"role": "user", "content": "Where is water? 水"}, {"role": "user", "content": "?"})
    token_ids = processor.encode(Submit(request_id="r", messages=messages), LIMIT)
    expected = reference.apply_chat_template(list(messages), add_generation_prompt=True)
    assert list(token_ids) == list(expected["input_ids"])
    assert list(token_ids).count(reference.bos_token_id) == 1, "the template writes it, once"


@pytest.mark.parametrize("begin", [True, False, None])
@pytest.mark.parametrize("end", [True, False, None])
def test_begin_and_end_come_from_the_tokenizer_file(
    tmp_path: Path, begin: bool | None, end: bool | None
) -> None:
    """As in transformers 5: what tokenizer.json says wins over these flags."""
    flags = {"add_bos_token": begin, "add_eos_token": end}
    given_flags: dict[str, Any] = {
        name: value for name, value in flags.items() if value is not None
    }
    folder = write_model_dir(tmp_path, byte_level_tokenizer(), **given_flags)
    expected = AutoTokenizer.from_pretrained(folder)("water")["input_ids"]
    assert list(TextProcessor(folder).encode(prompt("water"), LIMIT)) == expected


def test_named_special_tokens_of_the_vocabulary_become_special(tmp_path: Path) -> None:
    folder = write_model_dir(tmp_path, byte_level_tokenizer(), eos_token="e")
    processor, reference = TextProcessor(folder), AutoTokenizer.from_pretrained(folder)
    token_ids = list(processor.encode(prompt("these e"), LIMIT))
    assert token_ids == reference("these e")["input_ids"]
    assert processor.decode(token_ids, True) == reference.decode(
        token_ids, skip_special_tokens=True
    )


def test_truncation_and_padding_of_the_file_are_off(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.enable_truncation(max_length=4)
    tokenizer.enable_padding(length=64)
    folder = write_model_dir(tmp_path, tokenizer)
    short = TextProcessor(folder).encode(prompt("water"), LIMIT)
    long = TextProcessor(folder).encode(prompt("water " * 20), LIMIT)
    assert len(short) < 10
    assert len(long) > 20


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": 3}, {"eos_token_id": 2}, {3}),
        ({"eos_token_id": [3, 5]}, {}, {3, 5}),
        ({}, {"eos_token_id": 2}, {2}),
        (None, {"eos_token_id": [2, 4]}, {2, 4}),
        (None, {"eos_token_id": None}, set()),
        (None, {"text_config": {"eos_token_id": 7, "vocab_size": 50}}, {7}),
    ],
)
def test_end_of_sequence_ids(
    tmp_path: Path, generation: dict[str, Any] | None, config: dict[str, Any], expected: set[int]
) -> None:
    folder = write_model_dir(tmp_path, None, config=config)
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    processor = TextProcessor(folder)
    assert processor.eos_token_ids == expected
    assert processor.vocab_size == (50 if "text_config" in config else 600)


def refusal(processor: TextProcessor, submit: Submit, limit: int = LIMIT) -> RequestError:
    with pytest.raises(RequestError) as caught:
        processor.encode(submit, limit)
    assert "\n" not in str(caught.value)
    return caught.value


CHAT = ({"role": "user", "content": "x"},)


@pytest.mark.parametrize(
    ("submit", "code", "words"),
    [
        (Submit(request_id="r"), "prompt", "not none"),
        (Submit(request_id="r", prompt="a", messages=CHAT), "prompt", "prompt and messages"),
        (Submit(request_id="r", prompt="a", prompt_token_ids=(1,)), "prompt", "exactly one"),
        (Submit(request_id="r", prompt_token_ids=()), "empty_prompt", "no tokens"),
        (Submit(request_id="r", prompt=""), "empty_prompt", "empty"),
        (
            Submit(request_id="r", prompt="a", chat=ChatOptions(add_generation_prompt=False)),
            "prompt",
            "with messages only",
        ),
        (Submit(request_id="r", messages=()), "empty_prompt", "messages is empty"),
        (Submit(request_id="r", prompt_token_ids=(1, 600, 3)), "vocabulary", "600"),
        (Submit(request_id="r", messages=({"role": "user", "content": 5},) * 5000), "too_long", ""),
    ],
)
def test_bad_prompts_are_refused(
    processor: TextProcessor, submit: Submit, code: str, words: str
) -> None:
    error = refusal(processor, submit)
    assert error.code == code
    assert words in str(error)


def test_a_prompt_must_leave_room_for_one_token(processor: TextProcessor) -> None:
    ids = Submit(request_id="r", prompt_token_ids=(5,) * 31)
    assert processor.encode(ids, 32) == (5,) * 31
    error = refusal(processor, ids, 31)
    assert error.code == "too_long"
    assert "31 tokens" in str(error)
    assert "max_model_len 31" in str(error)


def test_hopelessly_long_text_is_refused_before_tokenising(processor: TextProcessor) -> None:
    error = refusal(processor, prompt("water " * 10**6), 128)
    assert "6000000 characters" in str(error)
    deep: Any = "water " * 10**6
    for _ in range(500):
        deep = [deep]
    messages = ({"role": "user", "content": deep},)
    error = refusal(processor, Submit(request_id="r", messages=messages), 128)
    assert error.code == "too_long"


def test_without_tokenizer_only_ids_are_served(tmp_path: Path) -> None:
    processor = TextProcessor(write_model_dir(tmp_path, None))
    assert not processor.has_tokenizer
    assert processor.encode(Submit(request_id="r", prompt_token_ids=(1, 2)), LIMIT) == (1, 2)
    assert processor.decode((1, 2), True) == ""
    assert refusal(processor, prompt("a")).code == "no_tokenizer"


def test_without_template_no_chat(tmp_path: Path) -> None:
    processor = TextProcessor(write_model_dir(tmp_path, byte_level_tokenizer()))
    error = refusal(processor, Submit(request_id="r", messages=CHAT))
    assert error.code == "no_chat_template"


def test_template_without_tokenizer_is_refused_for_text(tmp_path: Path) -> None:
    folder = write_model_dir(tmp_path, None)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    error = refusal(TextProcessor(folder), Submit(request_id="r", messages=CHAT))
    assert error.code == "no_tokenizer"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("config.json", "{", "not JSON"),
        ("config.json", "[]", "JSON object"),
        ("config.json", "{}", "vocab_size"),
        ("generation_config.json", '{"eos_token_id": 600}', "eos_token_id"),
        ("generation_config.json", '{"eos_token_id": "</s>"}', "eos_token_id"),
        ("tokenizer.json", "{}", "tokenizer.json"),
        ("tokenizer_config.json", '{"chat_template": 5}', "chat_template"),
        ("tokenizer_config.json", '{"chat_template": [{"name": "rag", "template": ""}]}', "rag"),
        ("chat_template.jinja", "a\n{% if %}", "line 2"),
    ],
)
def test_broken_folders_are_refused(tmp_path: Path, name: str, content: str, words: str) -> None:
    folder = write_model_dir(tmp_path, None)
    (folder / name).write_text(content)
    with pytest.raises(ModelError, match=words):
        TextProcessor(folder)


def test_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json"):
        TextProcessor(tmp_path / "nothing")


def test_ids_the_model_lacks_are_refused_from_text_too(tmp_path: Path) -> None:
    tokenizer: Tokenizer = byte_level_tokenizer()
    folder = write_model_dir(tmp_path, tokenizer, config={"vocab_size": 10, "eos_token_id": 1})
    assert refusal(TextProcessor(folder), prompt("water")).code == "vocabulary"


def test_text_of_one_token_and_of_a_prompt(processor: TextProcessor, reference: Any) -> None:
    ids = reference.encode("The pump lifts water", add_special_tokens=False)
    for _ in range(2):
        assert [processor.token_text(i) for i in ids] == [reference.decode([i]) for i in ids]
    submit = Submit(request_id="r", prompt_token_ids=tuple(ids))
    assert processor.prompt_text(submit, ids) == reference.decode(ids)
    given = Submit(request_id="r", prompt=" as it was ")
    assert processor.prompt_text(given, ids) == " as it was "


def test_bad_words_with_and_without_a_space(processor: TextProcessor, reference: Any) -> None:
    """As vLLM does: the spaced form only where it is another token, and no more of them."""
    words = ["water", " water", "pump", "é", "水", "the pipe"]
    expected = []
    for word in words:
        bare = reference.encode(word.lstrip(), add_special_tokens=False)
        spaced = reference.encode(" " + word.lstrip(), add_special_tokens=False)
        expected.append(tuple(bare))
        if spaced[0] != bare[0] and len(spaced) == len(bare):
            expected.append(tuple(spaced))
    assert processor.encode_bad_words(words) == tuple(expected)


def test_bad_words_without_tokens_are_refused(processor: TextProcessor) -> None:
    with pytest.raises(RequestError, match="'   ' has no tokens"):
        processor.encode_bad_words(["water", "   "])
