"""`/openapi.json`: the interface as OpenAPI 3.1 describes it.

What a body may hold comes from the tables and types by which bodies are read. What a schema cannot
say is left to the server: that a prompt fits, that a token exists, that a grammar can be followed.
Left out is what is read for old clients alone: vLLM's `guided_*`, and a `best_of` that equals `n`.
"""

from importlib.metadata import version
from typing import Any

import msgspec

from pipemax.proto.messages.ingest import ChatOptions, SamplingParams, StructuredOutputs
from pipemax.services.batch.openai_bodies import (
    MAX_TOP_LOGPROBS,
    MESSAGE_NEUTRAL,
    fields_of,
)
from pipemax.services.batch.openai_results import CHAT_URL, COMPLETIONS_URL
from pipemax.services.serve.batches import (
    ENDPOINTS,
    MAX_METADATA,
    MAX_METADATA_KEY_CHARS,
    MAX_METADATA_VALUE_CHARS,
    WINDOW_PATTERN,
)
from pipemax.services.serve.openapi_answers import (
    ANSWERS,
    integer,
    ref,
)
from pipemax.services.serve.openapi_operations import paths

Schema = dict[str, Any]
_REF = "#/components/schemas/{name}"
_NULL: Schema = {"type": "null"}
_BOOLEAN: Schema = {"type": ["boolean", "null"]}


def describe(model_name: str | None, *, with_keys: bool) -> Schema:
    """model_name: the one that is served, if there is one now."""
    _, components = msgspec.json.schema_components(
        (SamplingParams, ChatOptions, StructuredOutputs), ref_template=_REF
    )
    model: Schema = {"type": "string"} if model_name is None else {"const": model_name}
    schemas = {
        **ANSWERS,
        "StructuredOutputs": components["StructuredOutputs"],
        "ChatCompletionRequest": _body(CHAT_URL, model, components),
        "CompletionRequest": _body(COMPLETIONS_URL, model, components),
        "BatchRequest": _BATCH_REQUEST,
        "Upload": _UPLOAD,
    }
    found: Schema = {
        "openapi": "3.1.0",
        "info": {
            "title": "PipeMax",
            "version": version("pipemax"),
            "description": "OpenAI's interface to a running PipeMax system.",
        },
        "paths": paths(with_keys),
        "components": {"schemas": schemas},
    }
    if with_keys:
        schemes = {"key": {"type": "http", "scheme": "bearer"}}
        found["components"]["securitySchemes"] = schemes
    return found


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, _NULL]}


def _body(url: str, model: Schema, components: dict[str, Any]) -> Schema:
    sampling = components["SamplingParams"]["properties"]
    names, neutral = fields_of(url)
    fields: Schema = {"model": model}
    for name in names:
        known = "max_tokens" if name == "max_completion_tokens" else name
        fields[name] = _or_null(_plain(sampling[known]))
    for name, values in neutral.items():
        fields[name] = {"enum": [None, *values]}
    if "logit_bias" in fields:
        bias = next(s for s in sampling["logit_bias"]["anyOf"] if s != _NULL)
        fields["logit_bias"] = _or_null({**bias, "propertyNames": {"pattern": _ID_PATTERN}})
    stop = sampling["stop"]
    fields["stop"] = {"anyOf": [stop["items"], _plain(stop), _NULL]}
    fields["stream"] = _BOOLEAN
    fields["stream_options"] = _or_null(_STREAM_OPTIONS)
    fields["structured_outputs"] = _or_null(ref("StructuredOutputs"))
    fields["response_format"] = _or_null(_RESPONSE_FORMAT)
    required = ["model", "messages" if url == CHAT_URL else "prompt"]
    if url == CHAT_URL:
        options = components["ChatOptions"]["properties"]
        fields |= {name: _or_null(_plain(schema)) for name, schema in options.items()}
        fields["messages"] = _MESSAGES
        fields["logprobs"] = _BOOLEAN
        fields["top_logprobs"] = _or_null(integer(0, MAX_TOP_LOGPROBS))
    else:
        fields["prompt"] = _PROMPT
        fields["echo"] = _BOOLEAN
        fields["max_tokens"] = {"type": ["integer", "null"], "minimum": 0}
    return {
        "type": "object",
        "properties": dict(sorted(fields.items())),
        "required": required,
        "additionalProperties": False,
        "allOf": _rules(url),
    }


def _plain(schema: Schema) -> Schema:
    return {name: value for name, value in schema.items() if name != "default"}


def _rules(url: str) -> list[Schema]:
    """What fields of one body ask of each other."""
    plain = {"enum": [None, False]}
    free: Schema = {"enum": [None, {"type": "text"}]}
    streamed: Schema = {"stream": {"const": True}, "prompt_logprobs": _NULL}
    if url == COMPLETIONS_URL:
        streamed["echo"] = plain
    rules: list[Schema] = [
        {"anyOf": [_fields({"structured_outputs": _NULL}), _fields({"response_format": free})]},
        {
            "anyOf": [
                _fields({"stream": plain, "stream_options": _NULL}),
                _fields(streamed, "stream"),
            ]
        },
    ]
    if url == COMPLETIONS_URL:
        some: Schema = {"max_tokens": {"type": ["integer", "null"], "minimum": 1}}
        rules.append({"anyOf": [_fields(some), _fields({"echo": {"const": True}}, "echo")]})
    else:
        wanted = _fields({"logprobs": {"const": True}}, "logprobs")
        rules.append({"anyOf": [wanted, _fields({"top_logprobs": {"enum": [None, 0]}})]})
        lengths = ("max_tokens", "max_completion_tokens")
        rules.append({"anyOf": [_fields({name: _NULL}) for name in lengths]})
    return rules


def _fields(fields: Schema, *required: str) -> Schema:
    """Conditions on some of an object's fields."""
    return {"properties": fields, "required": list(required)}


_ID_PATTERN = r"^(0|[1-9][0-9]{0,8})$"
"""Of token ids as names."""
_STREAM_OPTIONS: Schema = {
    "type": "object",
    "properties": {"include_usage": _BOOLEAN},
    "additionalProperties": False,
}
_TEXT_PART: Schema = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
    "additionalProperties": False,
}
_MESSAGES: Schema = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "properties": {
            "role": {"type": "string", "minLength": 1},
            "content": {"anyOf": [{"type": "string"}, {"type": "array", "items": _TEXT_PART}]},
            **dict.fromkeys(MESSAGE_NEUTRAL, _NULL),
        },
        "required": ["role", "content"],
        "additionalProperties": False,
    },
}
_TOKEN_ID = integer(0, 2**31 - 1)
_IDS: Schema = {"type": "array", "items": _TOKEN_ID}
_ONE: Schema = {"minItems": 1, "maxItems": 1}
_PROMPT: Schema = {
    "anyOf": [
        {"type": "string"},
        _IDS,
        {"type": "array", "items": {"type": "string"}, **_ONE},
        {"type": "array", "items": _IDS, **_ONE},
    ]
}
_RESPONSE_FORMAT: Schema = {
    "anyOf": [
        {
            "type": "object",
            "properties": {"type": {"enum": ["text", "json_object"]}},
            "required": ["type"],
            "additionalProperties": False,
        },
        {
            "type": "object",
            "properties": {
                "type": {"const": "json_schema"},
                "json_schema": {
                    "type": "object",
                    "properties": {
                        "name": True,
                        "description": True,
                        "strict": True,
                        "schema": {"type": "object"},
                    },
                    "required": ["schema"],
                    "additionalProperties": False,
                },
            },
            "required": ["type", "json_schema"],
            "additionalProperties": False,
        },
    ]
}
_BATCH_REQUEST: Schema = {
    "type": "object",
    "properties": {
        "input_file_id": {"type": "string"},
        "endpoint": {"enum": list(ENDPOINTS)},
        "completion_window": {"type": "string", "pattern": WINDOW_PATTERN},
        "metadata": _or_null(
            {
                "type": "object",
                "maxProperties": MAX_METADATA,
                "propertyNames": {"maxLength": MAX_METADATA_KEY_CHARS},
                "additionalProperties": {
                    "type": "string",
                    "maxLength": MAX_METADATA_VALUE_CHARS,
                },
            }
        ),
    },
    "required": ["input_file_id", "endpoint", "completion_window"],
    "additionalProperties": False,
}
_UPLOAD: Schema = {
    "type": "object",
    "properties": {
        "purpose": {"type": "string", "enum": ["batch"]},
        "file": {"type": "string", "format": "binary"},
    },
    "required": ["purpose", "file"],
    "additionalProperties": False,
}
