"""OpenAI batch lines: what is accepted means what it says, everything else is refused by name."""

import json
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipemax.client import SamplingParams
from pipemax.proto.messages.ingest import ChatOptions, StructuredOutputs
from pipemax.services.batch.openai_lines import LineError, parse_line
from pipemax.services.batch.openai_results import CHAT_URL, COMPLETIONS_URL
from support.openai_lines import CHAT, line, parse


def refusal(text: bytes) -> LineError:
    with pytest.raises(LineError) as caught:
        parse(text)
    assert "\n" not in str(caught.value)
    return caught.value


def test_completion_with_defaults() -> None:
    request = parse(line())
    assert (request.custom_id, request.form.url) == ("c", COMPLETIONS_URL)
    assert request.submit.request_id == parse(line(CHAT_URL, seed=5)).submit.request_id
    other = json.dumps({**json.loads(line()), "custom_id": "d"}).encode()
    assert request.submit.request_id != parse(other).submit.request_id
    assert request.submit.prompt == "Water"
    assert request.submit.messages is None
    assert request.submit.sampling == SamplingParams(max_tokens=16)


def test_chat_with_defaults() -> None:
    submit = parse(line(CHAT_URL)).submit
    assert submit.messages == tuple(CHAT)
    assert submit.prompt is None
    assert submit.sampling == SamplingParams(max_tokens=None)


def test_every_sampling_field_is_taken() -> None:
    fields: dict[str, Any] = {
        "temperature": 0,
        "top_k": 5,
        "top_p": 0.5,
        "min_p": 0.1,
        "seed": 7,
        "stop": ["a", "b"],
        "stop_token_ids": [3],
        "min_tokens": 2,
        "max_tokens": 9,
        "presence_penalty": 0.5,
        "frequency_penalty": -1,
        "repetition_penalty": 1.2,
        "logit_bias": {"5": 1, "7": -100},
        "allowed_token_ids": [5, 6],
        "bad_words": ["worse"],
        "n": 2,
        "logprobs": 3,
        "prompt_logprobs": 2,
        "ignore_eos": True,
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
    }
    assert fields.keys() | {"structured_outputs"} == set(SamplingParams.__struct_fields__)
    tuples = {name: tuple(v) for name, v in fields.items() if isinstance(v, list)}
    expected = SamplingParams(**{**fields, **tuples, "logit_bias": {5: 1.0, 7: -100.0}})
    assert parse(line(**fields)).submit.sampling == expected
    assert parse(line(CHAT_URL, **fields | {"logprobs": True, "top_logprobs": 3})).submit == (
        msgspec.structs.replace(parse(line(CHAT_URL)).submit, sampling=expected)
    )
    for url in (CHAT_URL, COMPLETIONS_URL):
        assert parse(line(url, **dict.fromkeys(fields))).submit.sampling == SamplingParams(
            max_tokens=None if url == CHAT_URL else 16
        )


def test_whole_numbers_may_have_a_fraction_of_zero() -> None:
    """As JSON has it."""
    found = parse(line(prompt=[[5.0, 6]], logprobs=1.0, stop_token_ids=[7.0], temperature=1.0))
    assert found.submit.prompt_token_ids == (5, 6)
    assert found.submit.sampling.logprobs == 1
    assert found.submit.sampling.stop_token_ids == (7,)
    assert parse(line(CHAT_URL, logprobs=True, top_logprobs=2.0)).submit.sampling.logprobs == 2


def test_shorthands() -> None:
    assert parse(line(stop="end")).submit.sampling.stop == ("end",)
    for fields in ({"max_completion_tokens": 5}, {"max_completion_tokens": 5, "max_tokens": 5}):
        assert parse(line(CHAT_URL, **fields)).submit.sampling.max_tokens == 5
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    chat = [{"role": "system", "content": parts, "name": None}]
    assert parse(line(CHAT_URL, messages=chat)).submit.messages == (
        {"role": "system", "content": "a\nb"},
    )


@pytest.mark.parametrize(
    ("prompt", "text", "token_ids"),
    [
        ("a", "a", None),
        ([1, 2], None, (1, 2)),
        (["a"], "a", None),
        ([[1, 2]], None, (1, 2)),
        ("", "", None),
        ([], None, ()),
    ],
)
def test_prompts(prompt: Any, text: str | None, token_ids: tuple[int, ...] | None) -> None:
    submit = parse(line(prompt=prompt)).submit
    assert (submit.prompt, submit.prompt_token_ids) == (text, token_ids)


def test_chat_options() -> None:
    options = {
        "add_generation_prompt": False,
        "continue_final_message": True,
        "chat_template_kwargs": {"enable_thinking": False},
    }
    assert parse(line(CHAT_URL, **options)).submit.chat == ChatOptions(**options)
    assert parse(line(CHAT_URL, **dict.fromkeys(options))).submit.chat == ChatOptions()
    for name in options:
        assert refusal(line(**{name: options[name]})).code == "unknown_field"


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"response_format": {"type": "json_object"}}, {"json_object": True}),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "strict": True, "schema": SCHEMA},
                }
            },
            {"json": SCHEMA},
        ),
        ({"guided_json": SCHEMA}, {"json": SCHEMA}),
        ({"guided_regex": "a+"}, {"regex": "a+"}),
        ({"guided_choice": ["a", "b"]}, {"choice": ("a", "b")}),
        ({"guided_grammar": "start: 'a'"}, {"grammar": "start: 'a'"}),
        ({"structured_outputs": {"regex": "a+"}}, {"regex": "a+"}),
        (
            {"structured_outputs": {"regex": "a+"}, "response_format": {"type": "text"}},
            {"regex": "a+"},
        ),
    ],
)
def test_structured_outputs(fields: dict[str, Any], expected: dict[str, Any]) -> None:
    for url in (CHAT_URL, COMPLETIONS_URL):
        found = parse(line(url, **fields)).submit.sampling.structured_outputs
        assert found == StructuredOutputs(**expected)


def test_fields_that_ask_for_nothing_are_accepted() -> None:
    both: dict[str, Any] = {
        "n": 1,
        "best_of": 1,
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "stream": False,
    }
    none: dict[str, Any] = dict.fromkeys(("logit_bias", "user", "stream_options"))
    parse(line(**both, **none, echo=False, suffix=None, logprobs=None))
    parse(line(CHAT_URL, **both, **none, logprobs=False, top_logprobs=0, tools=[], audio=None))
    parse(line(CHAT_URL, response_format={"type": "text"}, tool_choice="none"))


@pytest.mark.parametrize(
    ("url", "field", "value"),
    [
        (COMPLETIONS_URL, "suffix", "x"),
        (COMPLETIONS_URL, "stream", True),
        (COMPLETIONS_URL, "user", "me"),
        (CHAT_URL, "echo", True),
        (CHAT_URL, "tools", [{"type": "function"}]),
        (CHAT_URL, "chat_template", "{{ messages }}"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(url: str, field: str, value: Any) -> None:
    error = refusal(line(url, **{field: value}))
    assert (error.code, error.status, error.custom_id) == ("not_implemented", 400, "c")
    assert str(error) == f"not implemented: {field!r}"


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        (b"{", "invalid_json", "not JSON"),
        (b'{"a": NaN}', "invalid_json", "not JSON"),
        (b"\xff\xfe", "invalid_json", "not JSON"),
        (b'"\xff"', "invalid_json", "not JSON"),
        (b"[" * 100_000, "invalid_json", "not JSON"),
        (b"[]", "invalid_line", "object"),
        (b"{}", "invalid_line", "custom_id"),
        (line(temprature=1), "unknown_field", "'temprature'"),
        (line(max_completion_tokens=5), "unknown_field", "'max_completion_tokens'"),
        (line(messages=CHAT), "unknown_field", "'messages'"),
        (line(CHAT_URL, prompt="a"), "unknown_field", "'prompt'"),
        (line(max_tokens=-5), "invalid_field", "max_tokens: Expected `int` >= 1, not -5"),
        (line(max_tokens="5"), "invalid_field", "max_tokens: Expected `int"),
        (line(temperature=-1), "invalid_field", "temperature"),
        (line(top_p=0), "invalid_field", "top_p"),
        (line(seed=2**70), "invalid_field", "seed"),
        (line(stop=[""]), "invalid_field", "stop"),
        (line(stop=5), "invalid_field", "stop"),
        (line(n=True), "invalid_field", "n: Expected"),
        (line(n=0), "invalid_field", "n: Expected"),
        (line(n=129), "invalid_field", "n: Expected"),
        (line(best_of=2), "not_implemented", "'best_of' 2 with n None"),
        (line(best_of=3, n=2), "not_implemented", "'best_of' 3 with n 2"),
        (line(best_of=True), "not_implemented", "'best_of' True"),
        (line(CHAT_URL, add_generation_prompt=1), "invalid_field", "add_generation_prompt"),
        (line(CHAT_URL, chat_template_kwargs=[]), "invalid_field", "chat_template_kwargs"),
        (line(guided_regex="a", guided_json={}), "invalid_field", "guided_json and guided_regex"),
        (line(guided_regex=5), "invalid_field", "structured_outputs"),
        (line(structured_outputs={"xml": "a"}), "invalid_field", "structured_outputs"),
        (line(response_format={"type": "xml"}), "invalid_field", "response_format"),
        (line(response_format={"type": "json_schema"}), "invalid_field", "response_format"),
        (
            line(response_format={"type": "json_schema", "json_schema": {"schema": "{}"}}),
            "invalid_field",
            "response_format",
        ),
        (line(logprobs=True), "invalid_field", "logprobs"),
        (line(logprobs=21), "invalid_field", "logprobs"),
        (line(echo=1), "invalid_field", "echo"),
        (line(echo=[]), "invalid_field", "echo"),
        (line(CHAT_URL, logprobs={}), "invalid_field", "logprobs"),
        (line(n=1.5), "invalid_field", "n: Expected"),
        (line(prompt=[1.5]), "invalid_field", "prompt"),
        (line(max_tokens=0), "invalid_field", "max_tokens"),
        (line(top_logprobs=1), "unknown_field", "'top_logprobs'"),
        (line(CHAT_URL, max_tokens=0), "invalid_field", "max_tokens"),
        (line(CHAT_URL, logprobs=1), "invalid_field", "logprobs"),
        (line(CHAT_URL, logprobs=True, top_logprobs=21), "invalid_field", "top_logprobs"),
        (line(CHAT_URL, logprobs=True, top_logprobs=True), "invalid_field", "top_logprobs"),
        (line(CHAT_URL, top_logprobs=2), "invalid_field", "logprobs to be true"),
        (line(stop_token_ids=[-1]), "invalid_field", "stop_token_ids"),
        (line(presence_penalty=2.1), "invalid_field", "presence_penalty"),
        (line(repetition_penalty=0), "invalid_field", "repetition_penalty"),
        (line(logit_bias={"5": 101}), "invalid_field", "logit_bias"),
        (line(logit_bias={"x": 1}), "invalid_field", "logit_bias"),
        (line(allowed_token_ids=[]), "invalid_field", "allowed_token_ids"),
        (line(bad_words=[""]), "invalid_field", "bad_words"),
        (line(CHAT_URL, max_tokens=4, max_completion_tokens=5), "invalid_field", "differ"),
        (line(prompt=["a", "b"]), "not_implemented", "2 prompts in one request"),
        (line(prompt=[[1], [2]]), "not_implemented", "2 prompts in one request"),
        (line(prompt=None), "invalid_field", "prompt"),
        (line(prompt=[1, "a"]), "invalid_field", "prompt"),
        (line(prompt=[True]), "invalid_field", "prompt"),
        (line(prompt=[[True]]), "invalid_field", "prompt"),
        (line(CHAT_URL, messages=[]), "invalid_field", "at least one"),
        (line(CHAT_URL, messages=["a"]), "invalid_field", "messages[0]"),
        (line(CHAT_URL, messages=[*CHAT, {"content": "a"}]), "invalid_field", "messages[1].role"),
        (line(CHAT_URL, messages=[{"role": "user"}]), "invalid_field", "messages[0].content"),
        (
            line(CHAT_URL, messages=[{**CHAT[0], "tool_calls": [1]}]),
            "not_implemented",
            "messages[0].tool_calls",
        ),
        (line(CHAT_URL, messages=[{**CHAT[0], "mood": 1}]), "unknown_field", "messages[0].mood"),
        (
            line(CHAT_URL, messages=[{"role": "user", "content": [{"type": "image_url"}]}]),
            "not_implemented",
            "image_url",
        ),
        (line(model=None), "invalid_field", "serves 'm'"),
        (line(model="other"), "model_not_found", "'other' is not served"),
    ],
)
def test_refusals(text: bytes, code: str, words: str) -> None:
    error = refusal(text)
    assert error.code == code
    assert words in str(error)
    assert error.status == (404 if code == "model_not_found" else 400)


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"custom_id": None}, "invalid_line", "custom_id"),
        ({"custom_id": ""}, "invalid_line", "custom_id"),
        ({"custom_id": "x" * 513}, "invalid_line", "custom_id"),
        ({"method": "GET"}, "invalid_line", "'POST', not 'GET'"),
        ({"url": "/v1/embeddings"}, "unknown_url", "/v1/embeddings"),
        ({"url": ["a"]}, "unknown_url", "not served"),
        ({"body": None}, "invalid_line", "body"),
        ({"extra": 1}, "unknown_field", "'extra'"),
    ],
)
def test_broken_envelopes(changes: dict[str, Any], code: str, words: str) -> None:
    error = refusal(json.dumps(json.loads(line()) | changes).encode())
    assert error.code == code
    assert words in str(error)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(
    body=st.dictionaries(
        st.sampled_from(["model", "prompt", "stop", "n", "max_tokens", "temperature", "seed", "x"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(max_size=3),
            lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(), inner),
            max_leaves=4,
        ),
    )
)
def test_any_body_is_a_request_or_a_line_error(body: dict[str, Any]) -> None:
    whole = {"custom_id": "c", "method": "POST", "url": COMPLETIONS_URL, "body": body}
    try:
        request = parse_line(json.dumps(whole).encode(), str(body.get("model")))
    except LineError as error:
        assert error.custom_id == "c"
    else:
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(request.submit), strict=True)
