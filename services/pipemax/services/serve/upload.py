"""A multipart form with one file: its fields, and the file's content straight to the disk."""

from collections.abc import AsyncIterator
from typing import Final

import anyio.to_thread
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from pipemax.services.serve.errors import ApiError
from pipemax.services.serve.store import Draft

_MAX_FIELD_BYTES = 4096
_WRITE_BYTES: Final = 2**20
FORM_BYTES = 64 * 1024
"""What a form may hold beside the file."""


class Form:
    """Fed piece by piece; nothing but `pending` grows with the file, and `flush` empties it."""

    def __init__(self, content_type: str) -> None:
        """Raises ApiError when the body is no form."""
        kind, options = parse_options_header(content_type)
        boundary = options.get(b"boundary")
        if kind != b"multipart/form-data" or not boundary:
            text = "send a form: `Content-Type: multipart/form-data` with a boundary"
            raise ApiError(415, "content_type", text)
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        self.is_complete = False
        self.pending: list[bytes] = []
        self.pending_bytes = 0
        self._name = ""
        self._is_file = False
        self._header = b""
        self._header_value = b""
        self._headers: dict[bytes, bytes] = {}
        self._value = b""
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._begin,
                    "on_header_field": self._on_header_field,
                    "on_header_value": self._on_header_value,
                    "on_header_end": self._on_header_end,
                    "on_headers_finished": self._on_headers,
                    "on_part_data": self._on_data,
                    "on_part_end": self._end,
                    "on_end": self._on_end,
                },
            )
        except FormParserError as error:
            raise _bad(str(error)) from error

    def feed(self, piece: bytes) -> None:
        """Raises ApiError for what is no form, or one with other fields than those of a file."""
        try:
            self._parser.write(piece)
        except FormParserError as error:
            raise _bad(str(error)) from error

    def _begin(self) -> None:
        self._headers, self._header, self._header_value, self._value = {}, b"", b"", b""

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _on_header_end(self) -> None:
        self._headers[self._header.lower()] = self._header_value
        self._header = self._header_value = b""

    def _on_headers(self) -> None:
        kind, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        self._name = options.get(b"name", b"").decode(errors="replace")
        self._is_file = self._name == "file"
        if kind != b"form-data" or self._name not in ("file", "purpose"):
            raise ApiError(
                400,
                "unknown_field",
                f"not implemented: field {self._name!r:.80}; a form has 'file' and 'purpose'",
                param=self._name[:80] or None,
            )
        if self._name in self.fields or (self._is_file and self.filename is not None):
            raise _bad(f"field {self._name!r} is given twice")
        if self._is_file:
            if b"filename" not in options:
                raise _bad("the field 'file' is no file: it has no filename")
            name = options[b"filename"].decode(errors="replace")
            self.filename = name.replace("\\", "/").rsplit("/", 1)[-1][:255]

    def _on_data(self, data: bytes, start: int, end: int) -> None:
        if self._is_file:
            self.pending.append(data[start:end])
            self.pending_bytes += end - start
            return
        self._value += data[start:end]
        if len(self._value) > _MAX_FIELD_BYTES:
            raise _bad(f"field {self._name!r} is longer than {_MAX_FIELD_BYTES} bytes")

    def _end(self) -> None:
        if not self._is_file:
            self.fields[self._name] = self._value.decode(errors="replace")

    def _on_end(self) -> None:
        self.is_complete = True


async def receive(form: Form, pieces: AsyncIterator[bytes], draft: Draft, most_bytes: int) -> None:
    """Feeds a form and writes its file. Raises ApiError for what is not one whole form with a file
    of at most so many bytes."""
    async for piece in pieces:
        form.feed(piece)
        if draft.size_bytes + form.pending_bytes > most_bytes:
            text = f"the file is larger than {most_bytes} bytes, which is this server's limit"
            raise ApiError(413, "too_large", text, headers={"Connection": "close"})
        if form.pending_bytes >= _WRITE_BYTES:
            await _flush(form, draft)
    if not form.is_complete:
        raise _bad("the form ends before its last boundary")
    if form.filename is None:
        raise ApiError(400, "missing_field", "the form has no field 'file'", param="file")
    await _flush(form, draft)


async def _flush(form: Form, draft: Draft) -> None:
    pieces, form.pending, form.pending_bytes = b"".join(form.pending), [], 0
    await anyio.to_thread.run_sync(draft.write, pieces)


def _bad(why: str) -> ApiError:
    return ApiError(400, "invalid_form", f"the form cannot be read: {why}")
