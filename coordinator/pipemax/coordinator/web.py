"""What the coordinator serves over HTTP: /metrics, /health, and a page for those without Grafana.
All of it only reads."""

import time
from collections.abc import Callable, Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Final

import msgspec
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from pipemax.coordinator.http_server import Reply, Request, Resource
from pipemax.coordinator.live_spans import LiveSpans
from pipemax.proto.messages.ingest import Status

_PAGE: Final = Path(__file__).with_name("page")
_FILES: Final = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
}
_JSON: Final = "application/json"


def resources(
    registry: CollectorRegistry, status: Callable[[], Status | None], spans: LiveSpans
) -> Mapping[str, Resource]:
    """By path. `status`: the last snapshot, None before there is one."""

    def metrics(request: Request) -> Reply:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Reply(encode(registry), content_type)

    def health(request: Request) -> Reply:
        now = status()
        phase = "starting" if now is None else now.phase
        missing = () if now is None else now.missing
        body = msgspec.json.encode({"phase": phase, "missing": missing})
        is_ready = phase in ("ready", "draining")
        code = HTTPStatus.OK if is_ready else HTTPStatus.SERVICE_UNAVAILABLE
        return Reply(body, _JSON, code)

    def live(request: Request) -> Reply:
        after = request.query.get("after", "0")
        found = spans.after(int(after) if after.isdecimal() and len(after) < 19 else 0)
        live = {
            "status": status(),
            "spans": [report for _, report in found],
            "last": found[-1][0] if found else None,
            "now_ns": time.monotonic_ns(),
        }
        return Reply(msgspec.json.encode(live), _JSON)

    served: dict[str, Resource] = {"/metrics": metrics, "/health": health, "/live.json": live}
    return served | {path: _file(*where) for path, where in _FILES.items()}


def _file(name: str, content_type: str) -> Resource:
    reply = Reply((_PAGE / name).read_bytes(), content_type)
    return lambda request: reply
