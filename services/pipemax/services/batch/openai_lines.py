"""Lines of batch files: JSON to a request.

A line is `{"custom_id", "method", "url", "body"}`. What a body holds is in `openai_bodies`, what
comes out in `openai_results`.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

import msgspec

from pipemax.client import Submit
from pipemax.services.batch.openai_bodies import PROMPT_FIELDS, parse_body
from pipemax.services.batch.openai_bodies import LineError as LineError
from pipemax.services.batch.openai_results import CHAT_URL, COMPLETIONS_URL, ResultForm

MAX_CUSTOM_ID_CHARS = 512
_LINE_FIELDS = ("custom_id", "method", "url", "body")


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """One line, understood."""

    custom_id: str
    submit: Submit
    form: ResultForm
    """Of its output line."""

    def within(self, timeout_s: float) -> "BatchRequest":
        """The same, to be done in so much time."""
        submit = msgspec.structs.replace(self.submit, timeout_s=timeout_s)
        return BatchRequest(self.custom_id, submit, self.form)


@dataclass(frozen=True, slots=True)
class Envelope:
    """What a line says beside its request."""

    custom_id: str
    url: str
    body: dict[str, Any]


def parse_line(line: bytes, model_name: str) -> BatchRequest:
    """The request in one line of a batch file. Its request id is made of its `custom_id`, so that
    a request without a seed is sampled alike in every run, wherever in the file it stands. Raises
    LineError, with the `custom_id` if that much could be read."""
    envelope = parse_envelope(line)
    digest = hashlib.blake2b(envelope.custom_id.encode(errors="surrogatepass"), digest_size=12)
    try:
        submit, form = parse_body(envelope.body, envelope.url, model_name, digest.hexdigest())
    except LineError as error:
        error.custom_id = envelope.custom_id
        raise
    return BatchRequest(envelope.custom_id, submit, form)


def parse_envelope(line: bytes) -> Envelope:
    """A line, without a look at its body. Raises LineError as `parse_line`."""
    try:
        found = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise LineError("invalid_json", f"the line is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise LineError("invalid_line", f"a line is an object with the keys {_LINE_FIELDS}")
    try:
        return _envelope(found)
    except LineError as error:
        custom_id = found.get("custom_id")
        error.custom_id = custom_id if isinstance(custom_id, str) else None
        raise


def _envelope(line: dict[str, Any]) -> Envelope:
    for name in line:
        if name not in _LINE_FIELDS:
            raise LineError("unknown_field", f"unknown field {name!r}; a line has {_LINE_FIELDS}")
    custom_id = line.get("custom_id")
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_CUSTOM_ID_CHARS:
        raise LineError(
            "invalid_line", f"custom_id must be a string of 1 to {MAX_CUSTOM_ID_CHARS} characters"
        )
    if line.get("method") != "POST":
        raise LineError("invalid_line", f"method must be 'POST', not {line.get('method')!r:.40}")
    url = line.get("url")
    if not isinstance(url, str) or url not in PROMPT_FIELDS:
        raise LineError(
            "unknown_url",
            f"url {url!r:.80} is not served; use {CHAT_URL} or {COMPLETIONS_URL}",
            status=404,
        )
    body = line.get("body")
    if not isinstance(body, dict):
        raise LineError("invalid_line", "body must be an object")
    return Envelope(custom_id, url, body)
