"""Batch lines for tests, and a coordinator's answers to them."""

import json
from pathlib import Path
from typing import Any

from pipemax.client import Submit
from pipemax.proto.messages.ingest import Refused
from support.fake_coordinator import finished


def request(custom_id: str, prompt: Any = "water", **body: Any) -> dict[str, Any]:
    return {
        "custom_id": custom_id,
        "method": "POST",
        "url": "/v1/completions",
        "body": {"model": "fake", "prompt": prompt, **body},
    }


def answer(submit: Submit) -> Any:
    """By prompt: `refuse` is refused, `fail` fails, the rest comes back in capitals."""
    if submit.prompt == "refuse":
        return Refused(request_id=submit.request_id, code="too_long", message="prompt is too long")
    if submit.prompt == "fail":
        return finished(submit, finish_reason="error", error="a stage is gone")
    return finished(submit)


def write_lines(path: Path, *lines: Any) -> Path:
    """Objects as JSON, bytes as they are."""
    texts = [part if isinstance(part, bytes) else json.dumps(part).encode() for part in lines]
    path.write_bytes(b"\n".join(texts))
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text().splitlines()]
