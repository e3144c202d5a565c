"""Every operation: what it takes, what it answers, and where its answers lead."""

from typing import Any

from pipemax.services.batch.openai_results import CHAT_URL, COMPLETIONS_URL
from pipemax.services.serve.batches import LISTED, MOST_LISTED
from pipemax.services.serve.files import MAX_FILES_LISTED
from pipemax.services.serve.openapi_answers import answers, integer, json_of, ref

Schema = dict[str, Any]


def paths(with_keys: bool) -> Schema:
    key: Schema = {"security": [{"key": []}]} if with_keys else {}
    keyed = (401,) if with_keys else ()
    body = (400, 408, 413, 415)
    disk = (500, 507)

    def operation(
        name: str,
        what: str,
        *answer: Any,
        guarded: bool = True,
        links: Schema | None = None,
        **more: Any,
    ) -> Schema:
        good, *bad = answer
        responses = answers(good, *bad, *(keyed if guarded else ()))
        if links is not None:
            responses["200"]["links"] = links
        return {
            "operationId": name,
            "summary": what,
            "responses": responses,
            **(key if guarded else {}),
            **more,
        }

    def sent(name: str, kind: str = "application/json") -> Schema:
        return {"required": True, "content": {kind: {"schema": ref(name)}}}

    file_id, batch_id = _in_path("file_id"), _in_path("batch_id")
    run = (*body, 404, 500, 503)
    to_batch = {
        "retrieve": _link("retrieveBatch", batch_id="$response.body#/id"),
        "cancel": _link("cancelBatch", batch_id="$response.body#/id"),
        "input": _link("retrieveFile", file_id="$response.body#/input_file_id"),
    }
    to_file = {
        "retrieve": _link("retrieveFile", file_id="$response.body#/id"),
        "content": _link("downloadFile", file_id="$response.body#/id"),
        "delete": _link("deleteFile", file_id="$response.body#/id"),
        "batch": {
            "operationId": "createBatch",
            "requestBody": {
                "input_file_id": "$response.body#/id",
                "endpoint": COMPLETIONS_URL,
                "completion_window": "24h",
            },
        },
    }
    page = [_in_query("after", {"type": "string"})]
    return {
        "/health": {
            "get": operation(
                "health", "Whether requests would be run", json_of("Health"), 503, guarded=False
            )
        },
        "/metrics": {
            "get": operation(
                "metrics",
                "This server's own, for Prometheus",
                {"text/plain": {"schema": {"type": "string"}}},
                guarded=False,
            )
        },
        "/v1/models": {
            "get": operation("listModels", "The model that is served", json_of("ModelList"), 503)
        },
        "/v1/models/{model}": {
            "get": operation(
                "retrieveModel", "The same by its name", json_of("Model"), 404, 503,
                parameters=[_in_path("model")],
            )
        },
        CHAT_URL: {
            "post": operation(
                "createChatCompletion",
                "Continue a chat",
                json_of("ChatCompletion") | _EVENTS,
                *run,
                requestBody=sent("ChatCompletionRequest"),
            )
        },
        COMPLETIONS_URL: {
            "post": operation(
                "createCompletion",
                "Continue a prompt",
                json_of("Completion") | _EVENTS,
                *run,
                requestBody=sent("CompletionRequest"),
            )
        },
        "/v1/files": {
            "post": operation(
                "createFile",
                "Upload a file of batch lines",
                json_of("File"),
                *body,
                *disk,
                requestBody=sent("Upload", "multipart/form-data"),
                links=to_file,
            ),
            "get": operation(
                "listFiles",
                "Files, newest first",
                json_of("FileList"),
                400,
                404,
                parameters=[
                    *page,
                    _in_query("limit", integer(1, MAX_FILES_LISTED)),
                    _in_query("order", {"enum": ["asc", "desc"]}),
                    _in_query("purpose", {"enum": ["batch", "batch_output"]}),
                ],
            ),
        },
        "/v1/files/{file_id}": {
            "get": operation(
                "retrieveFile", "About a file", json_of("File"), 404, parameters=[file_id]
            ),
            "delete": operation(
                "deleteFile",
                "Delete a file that no batch has yet to read",
                json_of("DeletedFile"),
                404,
                409,
                parameters=[file_id],
            ),
        },
        "/v1/files/{file_id}/content": {
            "get": operation(
                "downloadFile",
                "What a file holds",
                {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
                404,
                parameters=[file_id],
            )
        },
        "/v1/batches": {
            "post": operation(
                "createBatch",
                "Run the lines of a file",
                json_of("Batch"),
                *body,
                404,
                *disk,
                requestBody=sent("BatchRequest"),
                links=to_batch,
            ),
            "get": operation(
                "listBatches",
                f"Batches, newest first; {LISTED} unless told",
                json_of("BatchList"),
                400,
                404,
                parameters=[*page, _in_query("limit", integer(1, MOST_LISTED))],
            ),
        },
        "/v1/batches/{batch_id}": {
            "get": operation(
                "retrieveBatch", "How far a batch is", json_of("Batch"), 404,
                parameters=[batch_id],
            )
        },
        "/v1/batches/{batch_id}/cancel": {
            "post": operation(
                "cancelBatch",
                "Give up what is not done",
                json_of("Batch"),
                404,
                409,
                *disk,
                parameters=[batch_id],
            )
        },
    }  # fmt: skip


_EVENTS: Schema = {"text/event-stream": {}}


def _in_path(name: str) -> Schema:
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}


def _in_query(name: str, schema: Schema) -> Schema:
    return {"name": name, "in": "query", "schema": schema}


def _link(operation: str, **parameters: str) -> Schema:
    return {"operationId": operation, "parameters": parameters}
