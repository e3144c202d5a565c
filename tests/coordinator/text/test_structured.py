"""Structured outputs become grammars, and what cannot is refused with the reason."""

from typing import Any

import pytest

from pipemax.coordinator.text.structured import grammar_of
from pipemax.proto.errors import RequestError
from pipemax.proto.messages.ingest import StructuredOutputs


@pytest.mark.parametrize(
    "fields",
    [
        {"json": {"type": "object"}},
        {"json": '{"type": "array", "items": {"type": "integer"}}'},
        {"json_object": True},
        {"regex": "[a-z]+@[a-z]+"},
        {"choice": ("yes", 'no "really"', "vielleicht\\é")},
        {"grammar": 'start: "a" start | "b"'},
    ],
    ids=str,
)
def test_all_kinds(fields: dict[str, Any]) -> None:
    assert grammar_of(StructuredOutputs(**fields))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "exactly one"),
        ({"regex": "a", "json_object": True}, "exactly one"),
        ({"regex": "a(b"}, "regex: .*unclosed group"),
        ({"grammar": "start: x"}, "grammar: .*unknown name"),
        ({"json": {"type": "objec"}}, "json: Invalid type"),
        ({"json": "[1"}, "json: "),
        ({"json": "[]"}, "json: a schema is an object"),
        ({"json": {"type": "object", "x": ["y" * 1000] * 200}}, "more than 131072"),
    ],
    ids=str,
)
def test_refusals(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=f"structured_outputs: .*{words}") as caught:
        grammar_of(StructuredOutputs(**fields))
    assert caught.value.code == "structured_outputs"
    assert len(str(caught.value)) < 700
