"""`/v1/files`."""

import errno
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, TypeVar

import anyio.to_thread
import msgspec
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response

from pipemax.services.serve.body import pieces
from pipemax.services.serve.errors import ApiError
from pipemax.services.serve.settings import ServeSettings
from pipemax.services.serve.store import Draft, FileStore, StoredFile, new_file_id
from pipemax.services.serve.upload import FORM_BYTES, Form, receive

T = TypeVar("T")
_PURPOSES = ("batch", "batch_output")
MAX_FILES_LISTED = 10_000


class Files:
    """The endpoints."""

    def __init__(
        self,
        store: FileStore,
        settings: ServeSettings,
        *,
        is_needed: Callable[[str], bool],
        on_kept: Callable[[int], None],
    ) -> None:
        """is_needed: a batch has yet to read the file. on_kept: told of the bytes of each."""
        self._store = store
        self._settings = settings
        self._is_needed = is_needed
        self._on_kept = on_kept

    async def create(self, request: Request) -> Response:
        form = Form(request.headers.get("content-type", ""))
        most_bytes, timeout_s = self._settings.max_file_bytes, self._settings.body_timeout_s
        body = pieces(request, most_bytes + FORM_BYTES, timeout_s)
        try:
            with self._store.writing(new_file_id()) as draft:
                found = await self._receive(form, body, draft, most_bytes)
        except OSError as error:
            raise disk_error(error) from error
        self._on_kept(found.bytes)
        return JSONResponse(shown(found))

    async def _receive(
        self, form: Form, body: AsyncIterator[bytes], draft: Draft, most_bytes: int
    ) -> StoredFile:
        await receive(form, body, draft, most_bytes)
        purpose = form.fields.get("purpose")
        if purpose != "batch":
            given = "is missing" if purpose is None else f"{purpose!r:.80} is not implemented"
            raise ApiError(400, "purpose", f"purpose {given}; give 'batch'", param="purpose")
        return await anyio.to_thread.run_sync(draft.keep, form.filename or "file", "batch")

    async def list(self, request: Request) -> Response:
        check_query(request, ("purpose", "limit", "order", "after"))
        purpose = request.query_params.get("purpose")
        if purpose is not None and purpose not in _PURPOSES:
            text = f"purpose {purpose!r:.80}: files are of the purposes {' and '.join(_PURPOSES)}"
            raise ApiError(400, "purpose", text, param="purpose")
        order = request.query_params.get("order", "desc")
        if order not in ("asc", "desc"):
            text = f"order must be asc or desc, not {order!r:.80}"
            raise ApiError(400, "order", text, param="order")
        found = [file for file in self._store.all() if purpose in (None, file.purpose)]
        if order == "asc":
            found.reverse()
        page, has_more = page_of(request, found, lambda file: file.id, MAX_FILES_LISTED)
        return JSONResponse(list_body([shown(file) for file in page], has_more))

    async def retrieve(self, request: Request) -> Response:
        return JSONResponse(shown(self._found(request)))

    async def content(self, request: Request) -> Response:
        found = self._found(request)
        return FileResponse(
            self._store.path(found.id),
            media_type="application/octet-stream",
            headers={"X-Content-Type-Options": "nosniff"},
        )

    async def delete(self, request: Request) -> Response:
        found = self._found(request)
        if self._is_needed(found.id):
            text = f"{found.id} is the input of a batch that is being taken in; cancel that first"
            raise ApiError(409, "in_use", text)
        await anyio.to_thread.run_sync(self._store.delete, found.id)
        return JSONResponse({"id": found.id, "object": "file", "deleted": True})

    def _found(self, request: Request) -> StoredFile:
        file_id = request.path_params["file_id"]
        found = self._store.get(file_id)
        if found is None:
            raise ApiError(404, "file_not_found", f"there is no file {file_id!r:.80}")
        return found


def disk_error(error: OSError) -> ApiError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    status, code = (507, "disk_full") if full else (500, "disk")
    return ApiError(status, code, f"it cannot be kept: {error.strerror}")


def shown(file: StoredFile) -> dict[str, Any]:
    found: dict[str, Any] = msgspec.to_builtins(file)
    return found


def check_query(request: Request, known: Sequence[str]) -> None:
    """Nothing is accepted and ignored."""
    for name, _ in request.query_params.multi_items():
        if name not in known:
            text = f"unknown parameter {name!r:.80}; there are {', '.join(known)}"
            raise ApiError(400, "unknown_field", text, param=name[:80])
        if len(request.query_params.getlist(name)) > 1:
            raise ApiError(400, "invalid_field", f"{name} is given twice", param=name)


def page_of(
    request: Request, found: Sequence[T], id_of: Callable[[T], str], most: int, default: int = 0
) -> tuple[Sequence[T], bool]:
    """What `limit` and `after` ask for, and whether there is more behind it."""
    text = request.query_params.get("limit", str(default or most))
    limit = int(text) if text.isascii() and text.isdigit() and len(text) < 9 else 0
    if not 1 <= limit <= most:
        raise ApiError(400, "limit", f"limit must be 1 to {most}, not {text!r:.80}", param="limit")
    after = request.query_params.get("after")
    start = 0
    if after is not None:
        ids = [id_of(item) for item in found]
        if after not in ids:
            raise ApiError(404, "not_found", f"after: there is no {after!r:.80}", param="after")
        start = ids.index(after) + 1
    return found[start : start + limit], start + limit < len(found)


def list_body(page: Sequence[dict[str, Any]], has_more: bool) -> dict[str, Any]:
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": has_more,
    }
