"""`/v1/batches`."""

import re
import time
from collections.abc import Callable
from typing import Any, TypeVar

import anyio.to_thread
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from pipemax.services.batch.openai_results import CHAT_URL, COMPLETIONS_URL
from pipemax.services.serve.body import read_json
from pipemax.services.serve.book import Batch, Book, new_batch_id, shown
from pipemax.services.serve.errors import ApiError
from pipemax.services.serve.files import check_query, disk_error, list_body, page_of
from pipemax.services.serve.settings import ServeSettings
from pipemax.services.serve.store import FileStore
from pipemax.services.serve.worker import Worker

T = TypeVar("T")
ENDPOINTS = (CHAT_URL, COMPLETIONS_URL)
WINDOW_PATTERN = r"^[1-9][0-9]{0,3}[mhd]$"
MAX_METADATA = 16
MAX_METADATA_KEY_CHARS = 64
MAX_METADATA_VALUE_CHARS = 512
MOST_LISTED, LISTED = 100, 20
_UNIT_S = {"m": 60, "h": 3600, "d": 86400}
_FIELDS = ("input_file_id", "endpoint", "completion_window", "metadata")


class Batches:
    """The endpoints."""

    def __init__(
        self, book: Book, store: FileStore, worker: Worker, settings: ServeSettings
    ) -> None:
        self._book = book
        self._store = store
        self._worker = worker
        self._settings = settings

    async def create(self, request: Request) -> Response:
        settings = self._settings
        body = await read_json(request, settings.max_body_bytes, settings.body_timeout_s)
        batch = new_batch(body, int(time.time()))
        found = self._store.get(batch.input_file_id)
        if found is None:
            text = f"there is no file {batch.input_file_id!r:.80}"
            raise ApiError(404, "file_not_found", text, param="input_file_id")
        if found.purpose != "batch":
            text = f"{found.id} is of the purpose {found.purpose!r}; upload one for 'batch'"
            raise ApiError(400, "purpose", text, param="input_file_id")
        await _kept(lambda: self._book.add(batch))
        self._worker.look()
        return JSONResponse(shown(batch))

    async def list(self, request: Request) -> Response:
        check_query(request, ("limit", "after"))
        found = self._book.all()
        page, has_more = page_of(request, found, lambda batch: batch.id, MOST_LISTED, LISTED)
        return JSONResponse(list_body([shown(batch) for batch in page], has_more))

    async def retrieve(self, request: Request) -> Response:
        return JSONResponse(shown(self._found(request)))

    async def cancel(self, request: Request) -> Response:
        batch_id = self._found(request).id

        def change() -> Batch:
            return self._book.change(
                batch_id,
                "validating",
                "in_progress",
                status="cancelling",
                cancelling_at=int(time.time()),
            )

        batch = await _kept(change)
        if batch.status not in ("cancelling", "cancelled"):
            text = f"{batch_id} is {batch.status}; only what is not done can be cancelled"
            raise ApiError(409, "invalid_status", text)
        self._worker.look()
        return JSONResponse(shown(batch))

    def _found(self, request: Request) -> Batch:
        batch_id = request.path_params["batch_id"]
        found = self._book.get(batch_id)
        if found is None:
            raise ApiError(404, "batch_not_found", f"there is no batch {batch_id!r:.80}")
        return found


async def _kept(write: Callable[[], T]) -> T:
    """Waits for the disk. Raises ApiError when it cannot be written."""
    try:
        return await anyio.to_thread.run_sync(write)
    except OSError as error:
        raise disk_error(error) from error


def new_batch(body: dict[str, Any], now: int) -> Batch:
    """What a body asks for. Raises ApiError that names what cannot be."""
    for name, value in body.items():
        if name not in _FIELDS and value is not None:
            raise _wrong(name, f"not implemented: {name!r:.80}; a batch has {', '.join(_FIELDS)}")
    endpoint, window = body.get("endpoint"), body.get("completion_window")
    if endpoint not in ENDPOINTS:
        raise _wrong("endpoint", f"endpoint must be {' or '.join(ENDPOINTS)}, not {endpoint!r:.80}")
    if not isinstance(window, str) or not re.fullmatch(WINDOW_PATTERN[1:-1], window):
        raise _wrong(
            "completion_window",
            f"completion_window must be a time such as '24h', '90m' or '7d', not {window!r:.80}",
        )
    file_id = body.get("input_file_id")
    if not isinstance(file_id, str):
        raise _wrong("input_file_id", "input_file_id must be the id of an uploaded file")
    return Batch(
        id=new_batch_id(),
        endpoint=endpoint,
        input_file_id=file_id,
        completion_window=window,
        created_at=now,
        expires_at=now + int(window[:-1]) * _UNIT_S[window[-1]],
        metadata=_metadata(body.get("metadata")),
    )


def _metadata(given: object) -> dict[str, str] | None:
    if given is None:
        return None
    if not isinstance(given, dict) or len(given) > MAX_METADATA:
        raise _wrong("metadata", f"metadata must be an object of at most {MAX_METADATA} texts")
    for name, value in given.items():
        if not isinstance(value, str) or len(value) > MAX_METADATA_VALUE_CHARS:
            most = MAX_METADATA_VALUE_CHARS
            raise _wrong("metadata", f"metadata.{name:.80} must be a text of at most {most}")
        if len(name) > MAX_METADATA_KEY_CHARS:
            raise _wrong("metadata", f"metadata: {name!r:.80} is longer than 64 characters")
    return given


def _wrong(param: str, message: str) -> ApiError:
    return ApiError(400, "invalid_field", message, param=param[:80])
