"""What an output must be, as a grammar that the last stage can follow.

llguidance compiles it to masks of tokens. It was chosen for its size: one library without
dependencies, which the coordinator can load as well, to refuse a bad grammar before it runs.
"""

import functools
import json
from typing import Any, Final

from pipemax.proto.errors import RequestError
from pipemax.proto.messages.ingest import StructuredOutputs

MAX_GRAMMAR_CHARS = 2**17
_SPACE: Final = {"whitespace_pattern": r"(\n {0,40}| ?)"}
"""Between the parts of JSON: a space, or a new line and its indentation. Without end, a model that
is unsure could go on with it for ever."""


def grammar_of(outputs: StructuredOutputs) -> str:
    """Raises RequestError with code `structured_outputs`."""
    given = [name for name in outputs.__struct_fields__ if getattr(outputs, name)]
    if len(given) != 1:
        raise _refused(f"give exactly one of {', '.join(outputs.__struct_fields__)}")
    try:
        from llguidance import LLMatcher
    except ImportError as error:
        raise _refused("llguidance is not installed here; pip install llguidance") from error
    try:
        grammar: str
        if outputs.regex is not None:
            grammar = LLMatcher.grammar_from_regex(outputs.regex)
        elif outputs.choice is not None:
            texts = " | ".join(json.dumps(text) for text in outputs.choice)
            grammar = LLMatcher.grammar_from_lark(f"start: {texts}")
        elif outputs.grammar is not None:
            grammar = LLMatcher.grammar_from_lark(outputs.grammar)
        else:
            grammar = LLMatcher.grammar_from_json_schema(_schema(outputs), overrides=_SPACE)
    except ValueError as error:
        raise _refused(f"{given[0]}: {error!s:.500}") from error
    if len(grammar) > MAX_GRAMMAR_CHARS:
        raise _refused(f"{given[0]}: more than {MAX_GRAMMAR_CHARS} characters")
    reason = _reason_against(grammar)
    if reason:
        raise _refused(f"{given[0]}: {reason:.500}")
    return grammar


def _schema(outputs: StructuredOutputs) -> dict[str, Any]:
    if outputs.json is None:
        return {"type": "object"}
    schema = json.loads(outputs.json) if isinstance(outputs.json, str) else outputs.json
    if not isinstance(schema, dict):
        raise ValueError("a schema is an object")
    return schema


@functools.lru_cache(maxsize=256)
def _reason_against(grammar: str) -> str:
    """Empty when it can be followed. A batch often has one grammar for all its lines."""
    from llguidance import LLMatcher

    is_wrong, messages = LLMatcher.validate_grammar_with_warnings(grammar)
    return " ".join(messages[0].split()) if is_wrong else ""


def _refused(reason: str) -> RequestError:
    return RequestError("structured_outputs", f"structured_outputs: {reason}")
