"""What the server answers, for its description."""

from typing import Any, get_args

from pipemax.services.serve.book import Status

Schema = dict[str, Any]


def ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def integer(least: int, most: int) -> Schema:
    return {"type": "integer", "minimum": least, "maximum": most}


def json_of(name: str) -> Schema:
    return {"application/json": {"schema": ref(name)}}


_WORDS = {
    400: "The request is not understood, or asks for what is not implemented",
    401: "No valid API key",
    403: "Without an API key, other hosts and other sites' pages are refused",
    404: "There is no such thing",
    408: "The body did not come",
    409: "Not in this state",
    413: "Larger than this server's limit",
    415: "Another content type",
    429: "Too much at once; try again after the time in Retry-After",
    500: "It failed, and not for what was asked",
    503: "No system, or one that is shutting down; try again after the time in Retry-After",
    507: "The disk is full",
}
_RETRY_AFTER = {"Retry-After": {"schema": {"type": "string"}, "description": "Seconds."}}
_REQUEST_ID = {"x-request-id": {"schema": {"type": "string"}, "description": "Of this answer."}}


def answers(good: Schema, *errors: int) -> Schema:
    """Of an operation. All may be refused for their host and their number."""
    found: Schema = {"200": {"description": "Done", "content": good, "headers": _REQUEST_ID}}
    for status in sorted({*errors, 403, 429}):
        headers = _REQUEST_ID | (_RETRY_AFTER if status in (429, 503) else {})
        found[str(status)] = {
            "description": _WORDS[status],
            "content": json_of("Error"),
            "headers": headers,
        }
    return found


def _object(*optional: str, **fields: Any) -> Schema:
    """All fields are there but the optional ones."""
    required = [name for name in fields if name not in optional]
    return {"type": "object", "properties": fields, "required": required}


def _list(name: str) -> Schema:
    ends = {"type": ["string", "null"]}
    return _object(
        object={"const": "list"},
        data={"type": "array", "items": ref(name)},
        first_id=ends,
        last_id=ends,
        has_more={"type": "boolean"},
    )


_TEXT = {"type": "string"}
_TEXT_OR_NULL = {"type": ["string", "null"]}
_COUNT = {"type": "integer", "minimum": 0}
_TIME_OR_NULL = {"type": ["integer", "null"]}
_FINISH = {"enum": ["stop", "length", "abort"]}
_OBJECT_OR_NULL = {"type": ["object", "null"]}
_TOKEN_IDS = {"type": "array", "items": {"type": "integer"}}


def _choice(**fields: Any) -> Schema:
    return _object(
        "prompt_logprobs",
        "token_ids",
        index=_COUNT,
        logprobs=_OBJECT_OR_NULL,
        finish_reason=_FINISH,
        stop_reason={"type": ["string", "integer", "null"]},
        token_ids=_TOKEN_IDS,
        prompt_logprobs={"type": "array"},
        **fields,
    )


def _completion(kind: str, choice: Schema) -> Schema:
    return _object(
        "prompt_logprobs",
        id=_TEXT,
        object={"const": kind},
        created=_COUNT,
        model=_TEXT,
        choices={"type": "array", "items": choice, "minItems": 1},
        usage=ref("Usage"),
        prompt_logprobs={"type": "array"},
    )


_TIMES = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
ANSWERS: dict[str, Schema] = {
    "Error": _object(
        error=_object(message=_TEXT, type=_TEXT, param=_TEXT_OR_NULL, code=_TEXT_OR_NULL)
    ),
    "Health": _object(status={"const": "ok"}),
    "Model": _object(
        id=_TEXT,
        object={"const": "model"},
        created=_COUNT,
        owned_by=_TEXT,
        max_model_len=_COUNT,
    ),
    "ModelList": _object(object={"const": "list"}, data={"type": "array", "items": ref("Model")}),
    "Usage": _object(prompt_tokens=_COUNT, completion_tokens=_COUNT, total_tokens=_COUNT),
    "ChatCompletion": _completion(
        "chat.completion",
        _choice(message=_object(role={"const": "assistant"}, content=_TEXT)),
    ),
    "Completion": _completion("text_completion", _choice(text=_TEXT)),
    "File": _object(
        id=_TEXT,
        object={"const": "file"},
        bytes=_COUNT,
        created_at=_COUNT,
        filename=_TEXT,
        purpose={"enum": ["batch", "batch_output"]},
        status={"const": "processed"},
    ),
    "FileList": _list("File"),
    "DeletedFile": _object(id=_TEXT, object={"const": "file"}, deleted={"const": True}),
    "Batch": _object(
        id=_TEXT,
        object={"const": "batch"},
        endpoint=_TEXT,
        input_file_id=_TEXT,
        completion_window=_TEXT,
        created_at=_COUNT,
        expires_at=_COUNT,
        metadata=_OBJECT_OR_NULL,
        status={"enum": list(get_args(Status))},
        errors={
            "anyOf": [
                {"type": "null"},
                _object(
                    object={"const": "list"},
                    data={
                        "type": "array",
                        "items": _object(
                            code=_TEXT, message=_TEXT, line=_TIME_OR_NULL, param=_TEXT_OR_NULL
                        ),
                    },
                ),
            ]
        },
        output_file_id=_TEXT_OR_NULL,
        error_file_id=_TEXT_OR_NULL,
        request_counts=_object(total=_COUNT, completed=_COUNT, failed=_COUNT),
        **{f"{name}_at": _TIME_OR_NULL for name in _TIMES},
    ),
    "BatchList": _list("Batch"),
}
